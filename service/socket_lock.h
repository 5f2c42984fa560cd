// The right to a UNIX socket's path: a flock on PATH.lock. Without it a second daemon would take
// the path over silently, and the first's exit would remove the second's socket.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "gpu/unique_fd.h"

namespace clusterkv::service {

// Makes the path's folder. The path is ours as long as the descriptor is open. `key` is the
// configuration's, for messages.
// Errors: FAILED_PRECONDITION (another daemon has it), UNAVAILABLE (what errno says).
absl::StatusOr<gpu::UniqueFd> LockSocketPath(const std::string& key, const std::string& path);

}  // namespace clusterkv::service
