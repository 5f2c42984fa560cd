#include "client/fetch_socket.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/attach_socket.h"
#include "client/grpc_status.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

// How long an answer is looked for without sleeping, where there are cores to spare: a layer takes
// some hundred microseconds, and waking up some ten.
constexpr unsigned kCoresToPoll = 8;
constexpr auto kPoll = std::chrono::milliseconds(1);

absl::Status Lost(const char* what, int error_number) {
  return absl::UnavailableError(
      absl::StrCat(what, ": ", absl::ErrnoToStatus(error_number, "").message()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<FetchSocket>> FetchSocket::Connect(const std::string& attach_path,
                                                                  const Deadline& deadline) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<AttachSocket> socket, AttachSocket::Connect(attach_path));
  v1::AttachRequest hello;
  hello.mutable_fetch_hello();
  CKV_RETURN_IF_ERROR(socket->Send(hello));
  CKV_ASSIGN_OR_RETURN(const AttachPacket packet, socket->Receive(deadline));
  if (packet.event.has_rejected()) {
    return FromCode(packet.event.rejected().code(), packet.event.rejected().message());
  }
  if (!packet.event.has_attached()) {
    return absl::InternalError("attach socket: no answer to FetchHello");
  }
  return std::unique_ptr<FetchSocket>(new FetchSocket(AttachSocket::Release(std::move(socket))));
}

absl::StatusOr<v1::FetchAnswer> FetchSocket::Call(const v1::FetchCall& call,
                                                  const Deadline& deadline) {
  call.SerializeToString(&request_);
  ssize_t done = 0;
  do {
    done = send(fd_.get(), request_.data(), request_.size(), MSG_NOSIGNAL);
  } while (done < 0 && errno == EINTR);
  if (done < 0) return Lost("send", errno);
  CKV_RETURN_IF_ERROR(AwaitAnswer(deadline));
  // With MSG_TRUNC the size of the whole packet, even if it is larger than the buffer.
  done = recv(fd_.get(), buffer_.data(), buffer_.size(), MSG_DONTWAIT | MSG_TRUNC);
  if (done < 0) return Lost("receive", errno);
  if (done == 0) return absl::UnavailableError("the daemon has closed the connection");
  v1::FetchAnswer answer;
  if (static_cast<size_t>(done) > buffer_.size() ||
      !answer.ParseFromArray(buffer_.data(), static_cast<int>(done))) {
    return absl::InternalError(absl::StrCat("malformed answer of ", done, " bytes"));
  }
  return answer;
}

// Until there is something to receive, or the end.
absl::Status FetchSocket::AwaitAnswer(const Deadline& deadline) const {
  static const bool may_poll = std::thread::hardware_concurrency() >= kCoresToPoll;
  const auto poll_until =
      std::min(deadline.time(), std::chrono::steady_clock::now() +
                                    (may_poll ? kPoll : std::chrono::milliseconds(0)));
  while (true) {
    const bool polls = std::chrono::steady_clock::now() < poll_until;
    pollfd wait = {.fd = fd_.get(), .events = POLLIN, .revents = 0};
    const timespec limit = absl::ToTimespec(polls ? absl::ZeroDuration() : deadline.remaining());
    const int ready = ppoll(&wait, 1, &limit, nullptr);
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return absl::ErrnoToStatus(errno, "poll");
    if (ready == 0 && !polls) return absl::DeadlineExceededError("no answer in time");
  }
}

}  // namespace clusterkv::client
