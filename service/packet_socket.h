// Packets with descriptors over a SOCK_SEQPACKET UNIX socket.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/unique_fd.h"

namespace clusterkv::service {

constexpr size_t kMaxPacketBytes = 4096;

// A listening socket at `path` with that mode; a stale socket there is replaced.
// Errors: INVALID_ARGUMENT (path too long), what errno says otherwise.
absl::StatusOr<gpu::UniqueFd> ListenPackets(const std::string& path, mode_t mode);

struct Packet {
  std::string bytes;
  std::vector<gpu::UniqueFd> fds;
};

// Errors: UNAVAILABLE (closed by the peer), NOT_FOUND (nothing there now), INVALID_ARGUMENT
// (packet too large or its descriptors were cut off).
absl::StatusOr<Packet> ReceivePacket(int socket);

enum class SendResult { kSent, kWouldBlock, kBroken };
SendResult SendPacket(int socket, const std::string& bytes, int fd);  // fd -1: none

}  // namespace clusterkv::service
