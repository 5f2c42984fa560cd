// A gRPC server of the ClusterKv service: binding, health, reflection, shutdown.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/grant_id.h"

namespace clusterkv::service {

class RpcCounters;
class ServiceCore;

struct GrpcServerOptions {
  // unix:PATH, or HOST:PORT; port 0 picks one.
  std::string listen;
  std::string attach_path;  // told to workers
  // Whose workers come here. The daemon's own socket is made with mode 0660, locked against a
  // second daemon, and has reflection. A grant's has mode 0666: the folder that it lies in is the
  // right to use it, which the caller sees to, also that no other daemon takes it.
  GrantId grant = kNoGrant;
};

// Thread-safe.
class GrpcServer {
 public:
  // The core must outlive it, and so must the counters, which servers may share. Errors:
  // FAILED_PRECONDITION (another daemon serves the address; it is not disturbed), UNAVAILABLE
  // (cannot bind).
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Create(const GrpcServerOptions& options,
                                                            ServiceCore& core, RpcCounters& calls);
  virtual ~GrpcServer() = default;

  virtual const std::string& address() const = 0;  // with the port that was picked
  virtual void SetServing(bool serving) = 0;       // grpc.health.v1
  // Waits for running calls up to the timeout, then cancels them. Idempotent.
  virtual void Shutdown(absl::Duration timeout) = 0;
};

}  // namespace clusterkv::service
