// The attach socket: who a worker is, and that it lives, proven by the kernel (design D10).
//
// One thread with epoll accepts connections (SOCK_SEQPACKET, proto/clusterkv/v1/attach.proto),
// takes SO_PEERCRED and SO_PEERPIDFD, hands descriptors out by SCM_RIGHTS, and watches each
// worker's process until it is dead, also after its session is over. Where the kernel has no
// SO_PEERPIDFD a record lock on a file of the worker's (lifeline) is looked at every second
// instead.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace clusterkv::service {

class ServiceCore;

struct AttachOptions {
  std::string path;
  bool allow_any = false;
  std::set<uint32_t> allow_uids;  // either is enough
  std::set<uint32_t> allow_gids;
  absl::Duration hello_timeout = absl::Seconds(10);
  size_t max_connections = 1024;
  bool use_pidfd = true;  // false: as on a kernel without it
};

class AttachServer {
 public:
  // The core must outlive it. Errors: FAILED_PRECONDITION (another daemon has the path), what errno
  // says, naming the path.
  static absl::StatusOr<std::unique_ptr<AttachServer>> Create(const AttachOptions& options,
                                                              ServiceCore& core);
  // Closes all connections and removes the socket.
  virtual ~AttachServer() = default;
};

}  // namespace clusterkv::service
