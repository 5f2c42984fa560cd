#include "client/ctl/top/top.h"

#include <iostream>
#include <memory>
#include <string>

#include "absl/time/clock.h"
#include "client/ctl/top/screen.h"
#include "client/ctl/top/top_view.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::ctl {
namespace {

// Of a line that goes to no terminal.
constexpr size_t kAnyColumns = 4096;

class Top {
 public:
  Top(Connection& connection, const TopOptions& options)
      : connection_(connection), options_(options) {}

  absl::Status Run() {
    CKV_RETURN_IF_ERROR(Ask());
    if (!options_.json && StdoutIsScreen()) {
      CKV_ASSIGN_OR_RETURN(screen_, Screen::Create());
    }
    absl::Status last;
    for (uint32_t done = 0;;) {
      Show();
      if (++done == options_.iterations || !Wait()) break;
      last = Ask();
    }
    return last;
  }

 private:
  // What went wrong is shown too.
  absl::Status Ask() {
    v1::GetStatusRequest request;
    request.set_want_recent_errors(true);
    auto status = connection_.GetStatus(request, Deadline(options_.timeout));
    tick_.time = absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::Now(), absl::UTCTimeZone());
    tick_.address = connection_.address();
    tick_.error = std::string(status.status().message());
    if (!status.ok()) return status.status();
    tick_.rates = asked_ ? RatesBetween(tick_.status, *status) : std::nullopt;
    tick_.status = *std::move(status);
    asked_ = true;
    return absl::OkStatus();
  }

  void Show() {
    if (options_.json) {
      std::cout << TopJson(tick_) << std::endl;
      return;
    }
    if (screen_ != nullptr) return screen_->Draw(TopLines(tick_), colour_);
    if (shown_) std::cout << "\n";
    for (const StyledLine& line : TopLines(tick_)) {
      std::cout << line.Render(kAnyColumns, /*colour=*/false) << "\n";
    }
    std::cout << std::flush;
    shown_ = true;
  }

  // False: someone wants to leave.
  bool Wait() {
    const absl::Time next = absl::Now() + options_.interval;
    if (screen_ == nullptr) {
      absl::SleepFor(options_.interval);
      return true;
    }
    while (true) {
      switch (screen_->Wait(next - absl::Now())) {
        case Screen::Event::kTimeout:
          return true;
        case Screen::Event::kResized:
          Show();
          break;
        case Screen::Event::kQuit:
          return false;
      }
    }
  }

  Connection& connection_;
  const TopOptions options_;
  const bool colour_ = StdoutWantsColour();
  std::unique_ptr<Screen> screen_;  // null: not on a terminal
  TopTick tick_;
  bool asked_ = false, shown_ = false;
};

}  // namespace

absl::Status RunTop(Connection& connection, const TopOptions& options) {
  return Top(connection, options).Run();
}

}  // namespace clusterkv::client::ctl
