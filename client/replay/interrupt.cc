#include "client/replay/interrupt.h"

#include <csignal>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace clusterkv::client::replay {
namespace {

volatile std::sig_atomic_t caught_signal = 0;

void Catch(int signal) { caught_signal = signal; }

}  // namespace

void CatchInterrupts() {
  struct sigaction action = {};
  action.sa_handler = Catch;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

absl::Status CheckInterrupt() {
  if (caught_signal == 0) return absl::OkStatus();
  return absl::CancelledError(absl::StrCat("interrupted: ", strsignal(caught_signal)));
}

}  // namespace clusterkv::client::replay
