// Packets with descriptors over a SOCK_SEQPACKET UNIX socket.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gpu/unique_fd.h"

namespace clusterkv::service {

// A listening socket at `path` with that mode; a stale socket there is replaced.
// Errors: INVALID_ARGUMENT (path too long), what errno says otherwise.
absl::StatusOr<gpu::UniqueFd> ListenPackets(const std::string& path, mode_t mode);

struct Packet {
  std::string bytes;
  std::vector<gpu::UniqueFd> fds;
};

// By way of `buffer`, which has the size of the largest packet. Errors: UNAVAILABLE (closed by the
// peer), NOT_FOUND (nothing there now), INVALID_ARGUMENT (packet too large or its descriptors were
// cut off).
absl::StatusOr<Packet> ReceivePacket(int socket, absl::Span<char> buffer);

enum class SendResult { kSent, kWouldBlock, kBroken };
SendResult SendPacket(int socket, const std::string& bytes, int fd);  // fd -1: none

}  // namespace clusterkv::service
