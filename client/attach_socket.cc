#include "client/attach_socket.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace clusterkv::client {
namespace {

constexpr size_t kMaxPacketBytes = 4096;
constexpr timeval kSendTimeout = {.tv_sec = 5, .tv_usec = 0};
// More than the protocol's one, so that a peer that sends two is seen rather than cut short.
constexpr size_t kMaxDescriptors = 4;

absl::Status Unavailable(const std::string& what, int error_number) {
  return absl::UnavailableError(
      absl::StrCat(what, ": ", absl::ErrnoToStatus(error_number, "").message()));
}

// Takes ownership of every descriptor of a packet; more than one is an error.
absl::Status TakeDescriptor(msghdr& header, gpu::UniqueFd& fd) {
  size_t received = 0;
  for (cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr;
       control = CMSG_NXTHDR(&header, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int raw = -1;
      std::memcpy(&raw, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
      fd = gpu::UniqueFd(raw);
      ++received;
    }
  }
  if (received <= 1) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("attach socket: ", received, " descriptors in one packet; allowed: 1"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<AttachSocket>> AttachSocket::Connect(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("attach path \"", path, "\" of ", path.size(),
                                                   " bytes; allowed: 1 to ",
                                                   sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  gpu::UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, "attach socket");
  if (setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &kSendTimeout, sizeof(kSendTimeout)) != 0) {
    return absl::ErrnoToStatus(errno, "attach socket: SO_SNDTIMEO");
  }
  int result = 0;
  do {
    result = connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  } while (result != 0 && errno == EINTR);
  if (result != 0) return Unavailable(absl::StrCat("attach socket ", path), errno);
  gpu::UniqueFd stop(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!stop.valid()) return absl::ErrnoToStatus(errno, "eventfd");
  return std::unique_ptr<AttachSocket>(new AttachSocket(std::move(fd), std::move(stop)));
}

absl::Status AttachSocket::Send(const v1::AttachRequest& request, int fd) {
  std::string bytes = request.SerializeAsString();
  iovec part = {bytes.data(), bytes.size()};
  msghdr header = {};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
  if (fd >= 0) {
    header.msg_control = control.data();
    header.msg_controllen = control.size();
    cmsghdr* const rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &fd, sizeof(int));
  }
  ssize_t sent = 0;
  do {
    sent = sendmsg(fd_.get(), &header, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) return Unavailable("attach socket: send", errno);
  return absl::OkStatus();
}

absl::StatusOr<AttachPacket> AttachSocket::Receive() {
  std::array<pollfd, 2> waits = {pollfd{.fd = stop_.get(), .events = POLLIN, .revents = 0},
                                 pollfd{.fd = fd_.get(), .events = POLLIN, .revents = 0}};
  while (poll(waits.data(), waits.size(), -1) < 0) {
    if (errno != EINTR) return absl::ErrnoToStatus(errno, "attach socket: poll");
  }
  if (waits[0].revents != 0) return absl::CancelledError("attach socket: no longer read");
  return ReceiveNow();
}

absl::StatusOr<AttachPacket> AttachSocket::Receive(const Deadline& deadline) {
  while (true) {
    pollfd wait = {.fd = fd_.get(), .events = POLLIN, .revents = 0};
    const int64_t milliseconds = absl::ToInt64Milliseconds(deadline.remaining()) + 1;
    const int ready = poll(&wait, 1, static_cast<int>(std::min<int64_t>(milliseconds, INT_MAX)));
    if (ready > 0) return ReceiveNow();
    if (ready < 0 && errno != EINTR) return absl::ErrnoToStatus(errno, "attach socket: poll");
    if (deadline.passed()) return absl::DeadlineExceededError("attach socket: no answer in time");
  }
}

absl::StatusOr<AttachPacket> AttachSocket::ReceiveNow() {
  std::array<char, kMaxPacketBytes> bytes;
  iovec part = {bytes.data(), bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * kMaxDescriptors)> control = {};
  msghdr header = {};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  ssize_t received = 0;
  do {
    received = recvmsg(fd_.get(), &header, MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  if (received < 0) return Unavailable("attach socket: receive", errno);

  AttachPacket packet;
  const absl::Status descriptors = TakeDescriptor(header, packet.fd);
  if (!descriptors.ok()) return descriptors;
  if (received == 0) return absl::UnavailableError("attach socket: closed by the daemon");
  if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
    return absl::InternalError("attach socket: a packet was cut short");
  }
  if (!packet.event.ParseFromArray(bytes.data(), static_cast<int>(received))) {
    return absl::InternalError(
        absl::StrCat("attach socket: malformed packet of ", received, " bytes"));
  }
  return packet;
}

void AttachSocket::StopReceiving() { eventfd_write(stop_.get(), 1); }

void AttachSocket::Finish(const Deadline& deadline) {
  shutdown(fd_.get(), SHUT_WR);
  while (!deadline.passed()) {
    pollfd wait = {.fd = fd_.get(), .events = POLLIN, .revents = 0};
    const int64_t milliseconds = absl::ToInt64Milliseconds(deadline.remaining()) + 1;
    const int ready = poll(&wait, 1, static_cast<int>(milliseconds));
    if (ready < 0 && errno == EINTR) continue;
    // Descriptors that still come are closed by the packet they came with.
    if (ready <= 0 || absl::IsUnavailable(ReceiveNow().status())) return;
  }
}

}  // namespace clusterkv::client
