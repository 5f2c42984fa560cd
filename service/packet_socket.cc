#include "service/packet_socket.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace clusterkv::service {
namespace {

constexpr size_t kMaxDescriptors = 8;

absl::Status FromErrno(const std::string& what) { return absl::ErrnoToStatus(errno, what.c_str()); }

std::vector<gpu::UniqueFd> TakeDescriptors(msghdr& header) {
  std::vector<gpu::UniqueFd> fds;
  for (cmsghdr* c = CMSG_FIRSTHDR(&header); c != nullptr; c = CMSG_NXTHDR(&header, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
  return fds;
}

}  // namespace

absl::StatusOr<gpu::UniqueFd> ListenPackets(const std::string& path, mode_t mode) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(fmt::format("attach-path: {} has {} bytes, at most {}", path,
                                                  path.size(), sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  gpu::UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket.valid()) return FromErrno("attach socket");
  unlink(path.c_str());  // the caller holds the lock that says that it is ours
  // Never wider than `mode`, not even for a moment: the file gets the socket's own mode, less the
  // process's mask. Then what the mask took.
  fchmod(socket.get(), mode);
  if (bind(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    return FromErrno("attach-path: cannot bind " + path);
  }
  if (chmod(path.c_str(), mode) != 0) return FromErrno("attach-path: cannot set mode of " + path);
  if (listen(socket.get(), SOMAXCONN) != 0) return FromErrno("attach-path: " + path);
  return socket;
}

absl::StatusOr<Packet> ReceivePacket(int socket, absl::Span<char> buffer) {
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
  iovec part{.iov_base = buffer.data(), .iov_len = buffer.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  const ssize_t received = recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (received < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
      return absl::NotFoundError("no packet");
    }
    return absl::UnavailableError(std::strerror(errno));
  }
  Packet packet;
  packet.fds = TakeDescriptors(header);
  if (received == 0) return absl::UnavailableError("closed");
  if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
    return absl::InvalidArgumentError(
        fmt::format("a packet above {} bytes or {} descriptors", buffer.size(), kMaxDescriptors));
  }
  packet.bytes.assign(buffer.data(), static_cast<size_t>(received));
  return packet;
}

SendResult SendPacket(int socket, const std::string& bytes, int fd) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec part{.iov_base = const_cast<char*>(bytes.data()), .iov_len = bytes.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (fd >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    cmsghdr* c = CMSG_FIRSTHDR(&header);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(c), &fd, sizeof(int));
  }
  if (sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return SendResult::kSent;
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR || errno == ETOOMANYREFS
             ? SendResult::kWouldBlock
             : SendResult::kBroken;
}

}  // namespace clusterkv::service
