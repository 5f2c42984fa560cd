// The attach socket: who a worker is, and that it lives, proven by the kernel (design D10).
//
// One thread with epoll accepts connections (SOCK_SEQPACKET, proto/clusterkv/v1/attach.proto),
// takes SO_PEERCRED and SO_PEERPIDFD, hands descriptors out by SCM_RIGHTS, and watches each
// worker's process until it is dead, also after its session is over. Where the kernel has no
// SO_PEERPIDFD a record lock on a file of the worker's (lifeline) is looked at every second
// instead.
//
// The daemon's own socket asks for an allowed uid or gid. A grant's does not: a container's uid is
// anything, and the only way to the socket is the folder that was mounted into that container.
//
// A connection that begins with FetchHello is no session's: it is handed on, and no longer ours.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gpu/unique_fd.h"
#include "service/grant_id.h"

namespace clusterkv::service {

class ServiceCore;

struct AttachOptions {
  std::string path;
  bool allow_any = false;
  std::set<uint32_t> allow_uids;  // either is enough
  std::set<uint32_t> allow_gids;
  absl::Duration hello_timeout = absl::Seconds(10);
  size_t max_connections = 1024;       // of the daemon's own socket
  size_t max_grant_connections = 128;  // of each grant's, so that none takes them from the others
  bool use_pidfd = true;               // false: as on a kernel without it
};

// Where connections for fetches go.
class FetchConnections {
 public:
  virtual ~FetchConnections() = default;
  // Takes the socket, unless it has an error: RESOURCE_EXHAUSTED. Thread-safe.
  virtual absl::Status Take(gpu::UniqueFd& socket, GrantId grant) = 0;
};

class AttachServer {
 public:
  // The core and `fetches` must outlive it. Errors: FAILED_PRECONDITION (another daemon has the
  // path), what errno says, naming the path.
  static absl::StatusOr<std::unique_ptr<AttachServer>> Create(const AttachOptions& options,
                                                              ServiceCore& core,
                                                              FetchConnections& fetches);
  // Closes all connections and removes the sockets.
  virtual ~AttachServer() = default;

  // A grant's socket at `path`, mode 0666. The caller sees to it that the path is its own.
  // Thread-safe. Errors: ALREADY_EXISTS (the grant listens), what errno says, naming the path.
  virtual absl::Status Listen(GrantId grant, const std::string& path) = 0;
  // Removes it. Its connections end with their sessions. Does nothing if there is none.
  virtual void StopListening(GrantId grant) = 0;
};

}  // namespace clusterkv::service
