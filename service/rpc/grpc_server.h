// The gRPC server: binding, health, reflection, shutdown.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/daemon_status.h"

namespace clusterkv::service {

class ServiceCore;

// Thread-safe.
class GrpcServer {
 public:
  // `listen` is unix:PATH (made with mode 0660) or HOST:PORT; port 0 picks one. The core must
  // outlive it. Errors: FAILED_PRECONDITION (another daemon serves the address; it is not
  // disturbed), UNAVAILABLE (cannot bind).
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Create(const std::string& listen,
                                                            const std::string& attach_path,
                                                            ServiceCore& core);
  virtual ~GrpcServer() = default;

  virtual const std::string& address() const = 0;  // with the port that was picked
  virtual std::vector<RpcStatus> calls() const = 0;
  virtual void SetServing(bool serving) = 0;  // grpc.health.v1
  // Waits for running calls up to the timeout, then cancels them. Idempotent.
  virtual void Shutdown(absl::Duration timeout) = 0;
};

}  // namespace clusterkv::service
