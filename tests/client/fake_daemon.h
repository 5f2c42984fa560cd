// The daemon's end of one connection to its attach socket, played by a test.
#pragma once

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "clusterkv/v1/attach.pb.h"
#include "gpu/unique_fd.h"

namespace clusterkv::client {

class FakeDaemon {
 public:
  FakeDaemon() : path_(testing::TempDir() + "ckv-fake-" + std::to_string(getpid())) {
    unlink(path_.c_str());
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path_.c_str(), sizeof(address.sun_path) - 1);
    listener_ = gpu::UniqueFd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    EXPECT_EQ(bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener_.get(), 1), 0);
  }
  ~FakeDaemon() { unlink(path_.c_str()); }

  const std::string& path() const { return path_; }

  void Accept() {
    peer_ = gpu::UniqueFd(accept(listener_.get(), nullptr, nullptr));
    ASSERT_TRUE(peer_.valid());
    const timeval timeout = {.tv_sec = 30, .tv_usec = 0};
    setsockopt(peer_.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  }
  void Close() { peer_.Reset(); }

  // `fds` ride along.
  void SendBytes(std::string bytes, const std::vector<int>& fds = {}) {
    iovec part = {bytes.data(), bytes.size()};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * 4)> control = {};
    msghdr header = {};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    if (!fds.empty()) {
      header.msg_control = control.data();
      header.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
      cmsghdr* const rights = CMSG_FIRSTHDR(&header);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
      std::memcpy(CMSG_DATA(rights), fds.data(), sizeof(int) * fds.size());
    }
    ASSERT_GE(sendmsg(peer_.get(), &header, MSG_NOSIGNAL), 0);
  }
  void Send(const v1::AttachEvent& event, const std::vector<int>& fds = {}) {
    SendBytes(event.SerializeAsString(), fds);
  }

  // The next packet; nullopt at the connection's end.
  template <typename Message = v1::AttachRequest>
  std::optional<Message> Receive(gpu::UniqueFd* fd = nullptr) {
    std::array<char, 4096> bytes;
    iovec part = {bytes.data(), bytes.size()};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
    msghdr header = {};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = control.size();
    const ssize_t received = recvmsg(peer_.get(), &header, MSG_CMSG_CLOEXEC);
    EXPECT_GE(received, 0) << std::strerror(errno);
    if (received <= 0) return std::nullopt;
    if (const cmsghdr* rights = CMSG_FIRSTHDR(&header); rights != nullptr) {
      int raw = -1;
      std::memcpy(&raw, CMSG_DATA(rights), sizeof(int));
      gpu::UniqueFd received_fd(raw);
      if (fd != nullptr) *fd = std::move(received_fd);
    }
    Message request;
    EXPECT_TRUE(request.ParseFromArray(bytes.data(), static_cast<int>(received)));
    return request;
  }

 private:
  const std::string path_;
  gpu::UniqueFd listener_, peer_;
};

}  // namespace clusterkv::client
