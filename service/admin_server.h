// The admin HTTP port: /livez /readyz /startupz /metrics /version /status, and for people / (a
// page), with /history and /sequences that it shows. Reads one snapshot for each request and waits
// for no device; nothing here changes anything.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "service/core_types.h"
#include "service/daemon_status.h"

namespace clusterkv::service {

struct AdminOptions {
  std::string listen;                    // HOST:PORT, port 0 picks one
  std::function<DaemonStatus()> status;  // thread-safe
  // Thread-safe; waits a moment at most. An error is /sequences' answer.
  std::function<absl::StatusOr<std::vector<SequenceStatus>>()> sequences;
};

class AdminServer {
 public:
  // Errors: INVALID_ARGUMENT (no HOST:PORT), UNAVAILABLE (cannot bind).
  static absl::StatusOr<std::unique_ptr<AdminServer>> Create(AdminOptions options);
  // Stops at once, whatever its clients do.
  virtual ~AdminServer() = default;

  virtual const std::string& address() const = 0;  // with the port that was picked
  // Adds the status as it is now to /history: once a second.
  virtual void Sample() = 0;
};

}  // namespace clusterkv::service
