// The Session stream: opens the session and reads its events, on a thread of its own.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/connection.h"
#include "client/deadline.h"

namespace clusterkv::client {

// Hears the events, on the stream's thread; must not block.
class SessionListener {
 public:
  virtual ~SessionListener() = default;
  // Credit, published, failed, draining.
  virtual void OnEvent(const v1::SessionEvent& event) = 0;
  // The last call, once; never OK.
  virtual void OnStreamEnded(const absl::Status& why) = 0;
};

// Thread-safe. Its end is the session's end.
class SessionStream {
 public:
  // Sends Hello and waits for Welcome. `listener` must outlive the stream.
  // Errors: what the daemon answered; DEADLINE_EXCEEDED; INTERNAL if its first word is no Welcome.
  static absl::StatusOr<std::unique_ptr<SessionStream>> Open(std::unique_ptr<SessionCall> call,
                                                             const v1::Hello& hello,
                                                             SessionListener& listener,
                                                             const Deadline& deadline);
  ~SessionStream();

  // Constant once open.
  const v1::Welcome& welcome() const { return welcome_; }
  uint64_t boot_epoch() const { return boot_epoch_; }

  // True once the listener has heard the end. Not on the stream's own thread.
  bool WaitEnded(const Deadline& deadline);
  // Lets the daemon end the stream, for a moment, then cancels it. Idempotent.
  void Close();
  // Ends the stream from any thread, also its own; does not wait.
  void Cancel() { call_->Cancel(); }

 private:
  SessionStream(std::unique_ptr<SessionCall> call, SessionListener& listener)
      : call_(std::move(call)), listener_(listener) {}
  void Run(const v1::SessionRequest& hello);
  bool ReadWelcome();

  const std::unique_ptr<SessionCall> call_;
  SessionListener& listener_;
  // Written by the thread before it signals `opened_`.
  v1::Welcome welcome_;
  uint64_t boot_epoch_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  bool opened_ = false;
  std::optional<absl::Status> ended_;

  std::thread thread_;  // joined by Close; touched by the owner only
};

}  // namespace clusterkv::client
