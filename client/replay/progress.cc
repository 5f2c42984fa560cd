#include "client/replay/progress.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "fmt/format.h"

namespace clusterkv::client::replay {
namespace {

constexpr uint64_t kBarColumns = 30;
constexpr std::chrono::milliseconds kDrawInterval(100);

}  // namespace

Progress::Progress(bool draw, std::function<void(uint64_t)> sink)
    : draw_(draw), sink_(std::move(sink)) {}

void Progress::Begin(const std::string& phase, uint64_t total) {
  const std::lock_guard lock(mutex_);
  phase_ = phase;
  total_ = std::max<uint64_t>(1, total);
  done_ = 0;
  if (draw_) Draw();
}

void Progress::Advance(uint64_t count) {
  const std::lock_guard lock(mutex_);
  if (sink_) sink_(count);
  done_ = std::min(done_ + count, total_);
  if (draw_ && std::chrono::steady_clock::now() >= next_draw_) Draw();
}

void Progress::Finish() {
  const std::lock_guard lock(mutex_);
  if (drawn_columns_ == 0) return;
  std::fputs(fmt::format("\r{:{}}\r", "", drawn_columns_).c_str(), stderr);
  std::fflush(stderr);
  drawn_columns_ = 0;
}

void Progress::Draw() {
  if (total_ == 0) return;
  const uint64_t filled = kBarColumns * done_ / total_;
  const std::string line = fmt::format("[{:#<{}}{:.<{}}] {:>3}% {}", "", filled, "",
                                       kBarColumns - filled, 100 * done_ / total_, phase_);
  std::fputs(fmt::format("\r{:<{}}", line, drawn_columns_).c_str(), stderr);
  std::fflush(stderr);
  drawn_columns_ = std::max(drawn_columns_, line.size());
  next_draw_ = std::chrono::steady_clock::now() + kDrawInterval;
}

}  // namespace clusterkv::client::replay
