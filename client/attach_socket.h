// The worker's end of the attach socket: one message a packet, at most one descriptor with it.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/deadline.h"
#include "clusterkv/v1/attach.pb.h"
#include "gpu/unique_fd.h"

namespace clusterkv::client {

struct AttachPacket {
  v1::AttachEvent event;
  gpu::UniqueFd fd;  // invalid unless one came along
};

// One reader; writers from any thread (packets are whole).
class AttachSocket {
 public:
  // Errors: UNAVAILABLE (nobody listens there), INVALID_ARGUMENT (path).
  static absl::StatusOr<std::unique_ptr<AttachSocket>> Connect(const std::string& path);
  // `fd` rides along unless it is -1; it stays the caller's. Bounded wait.
  // Errors: UNAVAILABLE (the daemon is gone or does not read).
  absl::Status Send(const v1::AttachRequest& request, int fd = -1);
  // Waits for a packet. Errors: UNAVAILABLE (closed), INTERNAL (not a message of the protocol),
  // CANCELLED (StopReceiving).
  absl::StatusOr<AttachPacket> Receive();
  // As Receive, but DEADLINE_EXCEEDED if none comes in time.
  absl::StatusOr<AttachPacket> Receive(const Deadline& deadline);
  // Ends a Receive that waits, and later ones; the daemon does not notice.
  void StopReceiving();
  // Nothing more will be sent; waits until the daemon has closed, too. A socket that is closed
  // with packets unread would reset the connection, and the daemon would lose our last ones.
  void Finish(const Deadline& deadline);
  // The socket itself, for what else is spoken over it.
  static gpu::UniqueFd Release(std::unique_ptr<AttachSocket> socket) {
    return std::move(socket->fd_);
  }

 private:
  AttachSocket(gpu::UniqueFd fd, gpu::UniqueFd stop) : fd_(std::move(fd)), stop_(std::move(stop)) {}
  absl::StatusOr<AttachPacket> ReceiveNow();

  gpu::UniqueFd fd_;          // constant until it is taken
  const gpu::UniqueFd stop_;  // eventfd; readable once StopReceiving was called
};

}  // namespace clusterkv::client
