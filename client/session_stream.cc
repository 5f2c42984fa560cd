#include "client/session_stream.h"

#include <pthread.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

// How long the daemon may take to end a stream that the client has finished writing.
constexpr absl::Duration kCloseTimeout = absl::Seconds(2);

}  // namespace

absl::StatusOr<std::unique_ptr<SessionStream>> SessionStream::Open(
    std::unique_ptr<SessionCall> call, const v1::Hello& hello, SessionListener& listener,
    const Deadline& deadline) {
  std::unique_ptr<SessionStream> stream(new SessionStream(std::move(call), listener));
  v1::SessionRequest request;
  *request.mutable_hello() = hello;
  // On the thread, too: a write waits for the connection, which a wedged daemon never completes.
  stream->thread_ =
      std::thread([raw = stream.get(), request = std::move(request)] { raw->Run(request); });
  pthread_setname_np(stream->thread_.native_handle(), "ckv-session");

  std::unique_lock lock(stream->mutex_);
  const bool answered = stream->changed_.wait_until(
      lock, deadline.time(), [&] { return stream->opened_ || stream->ended_.has_value(); });
  if (!answered) {
    stream->call_->Cancel();
    return absl::DeadlineExceededError("Session: no Welcome in time");
  }
  if (!stream->opened_) return *stream->ended_;
  return stream;
}

SessionStream::~SessionStream() { Close(); }

void SessionStream::Close() {
  if (!thread_.joinable()) return;
  bool open = false;
  {
    std::unique_lock lock(mutex_);
    open = opened_ && !ended_.has_value();
  }
  if (open) {
    call_->WritesDone();
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, Deadline(kCloseTimeout).time(), [&] { return ended_.has_value(); });
  }
  call_->Cancel();
  thread_.join();
}

bool SessionStream::WaitEnded(const Deadline& deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline.time(), [&] { return ended_.has_value(); });
}

bool SessionStream::ReadWelcome() {
  v1::SessionEvent event;
  if (!call_->Read(&event)) return false;
  if (!event.has_welcome()) {
    call_->Cancel();
    return false;
  }
  boot_epoch_ = event.boot_epoch();
  welcome_ = std::move(*event.mutable_welcome());
  const std::lock_guard lock(mutex_);
  opened_ = true;
  changed_.notify_all();
  return true;
}

void SessionStream::Run(const v1::SessionRequest& hello) {
  // A failed write shows as the end of the reads, which knows why.
  call_->Write(hello);
  const bool welcomed = ReadWelcome();
  v1::SessionEvent event;
  while (welcomed && call_->Read(&event)) listener_.OnEvent(event);
  absl::Status why = call_->Finish();
  if (why.ok()) {
    why = welcomed ? absl::UnavailableError("the daemon ended the session")
                   : absl::InternalError("Session: ended without a Welcome");
  } else if (!welcomed && absl::IsCancelled(why)) {
    why = absl::InternalError("Session: the first event is no Welcome");
  }
  if (welcomed) listener_.OnStreamEnded(why);
  const std::lock_guard lock(mutex_);
  ended_ = std::move(why);
  changed_.notify_all();
}

}  // namespace clusterkv::client
