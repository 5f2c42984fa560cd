// SIGINT and SIGTERM end a replay in order: the private daemon is stopped, its files are removed.
#pragma once

#include "absl/status/status.h"

namespace clusterkv::client::replay {

// For the whole process. A second signal ends it at once.
void CatchInterrupts();
// CANCELLED after a signal, else OK.
absl::Status CheckInterrupt();

}  // namespace clusterkv::client::replay
