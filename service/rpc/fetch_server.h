// Served fetches beside gRPC: FetchClusters calls as packets (proto/clusterkv/v1/fetch.proto) over
// connections that the attach server handed on.
//
// gRPC's way of one call through its pollers and threads costs more than the step of a layer. Here
// one thread with epoll reads the calls, and the thread that completes one writes the answer. For
// `poll` after the last call the thread looks for the next without sleeping.
//
// A connection of a worker's allows nothing by itself: each call names its session, as the RPC
// does, and is counted as one of the RPC's.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/attach_server.h"

namespace clusterkv::service {

class RpcCounters;
class ServiceCore;

struct FetchServerOptions {
  size_t max_connections = 1024;       // of the daemon's own socket
  size_t max_grant_connections = 128;  // of each grant's
  absl::Duration poll = absl::ZeroDuration();
};

class FetchServer : public FetchConnections {
 public:
  // The core must outlive it. The counters must outlive the core's work threads, which complete
  // calls. Errors: what errno says.
  static absl::StatusOr<std::unique_ptr<FetchServer>> Create(const FetchServerOptions& options,
                                                             ServiceCore& core, RpcCounters& calls);
  // Closes all connections. Calls that have not been answered lose their answers.
  ~FetchServer() override = default;
};

}  // namespace clusterkv::service
