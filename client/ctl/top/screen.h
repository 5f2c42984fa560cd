// The whole terminal, for a program that draws it again and again. While it lives, what stood there
// is kept aside; its end, and Ctrl-C, Ctrl-Z and other signals to stop, bring it back.
#pragma once

#include <termios.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/ctl/styled_line.h"

namespace clusterkv::client::ctl {

// One at a time in a process: it takes its signals.
class Screen {
 public:
  // Errors: of the system, for a terminal that cannot be set up.
  static absl::StatusOr<std::unique_ptr<Screen>> Create();
  ~Screen();

  // In one write, from the top left corner on, so that nothing flickers. What does not fit is cut.
  void Draw(const std::vector<StyledLine>& lines, bool colour);

  enum class Event { kTimeout, kResized, kQuit };
  // Until the time is over, the terminal changes, or someone wants to leave (q, Ctrl-C, a signal).
  Event Wait(absl::Duration timeout);

 private:
  Screen() = default;
  void Enter();
  void Leave();
  Event Take(int signal_number);

  termios before_{};
  bool has_keys_ = false;    // stdin is the terminal too
  bool reads_keys_ = false;  // and has not ended
};

}  // namespace clusterkv::client::ctl
