// A progress bar on stderr, when that is a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

namespace clusterkv::client::replay {

// Thread-safe.
class Progress {
 public:
  // `sink` takes the counts instead of drawing anything, if it is set.
  explicit Progress(bool draw, std::function<void(uint64_t)> sink = nullptr);
  ~Progress() { Finish(); }

  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Begin(const std::string& phase, uint64_t total);
  void Advance(uint64_t count);
  // Removes the bar.
  void Finish();

 private:
  void Draw();

  const bool draw_;
  const std::function<void(uint64_t)> sink_;
  std::mutex mutex_;
  // Guarded by mutex_.
  std::string phase_;
  uint64_t total_ = 0;
  uint64_t done_ = 0;
  size_t drawn_columns_ = 0;
  std::chrono::steady_clock::time_point next_draw_;
};

}  // namespace clusterkv::client::replay
