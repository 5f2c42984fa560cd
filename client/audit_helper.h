// Sends sampled steps to the daemon on a thread of its own, so that no step waits for it. An audit
// is never worth more than that: what does not fit the queue, or is refused, is dropped.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/status/status.h"
#include "client/audit_ring.h"
#include "client/deadline.h"
#include "clusterkv/v1/sequence.pb.h"

namespace clusterkv::client {

// A step that is complete: what `request` names lies in the slot.
struct AuditSample {
  AuditRing::Slot slot;
  v1::AuditStepRequest request;
};

// Thread-safe.
class AuditHelper {
 public:
  // Bounded; called on the helper's thread.
  using Send = std::function<absl::Status(const v1::AuditStepRequest&)>;

  explicit AuditHelper(Send send);
  ~AuditHelper();

  void Submit(AuditSample sample);
  // Waits until what was submitted has been sent, the deadline, or Stop.
  void Flush(const Deadline& deadline);
  // Drops what is queued and ends the thread. Idempotent.
  void Stop();

 private:
  static constexpr size_t kMaxQueued = 32;

  void Run();

  const Send send_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_. Samples are destroyed without it.
  std::deque<AuditSample> queue_;
  bool sending_ = false;
  bool stop_ = false;
  std::thread thread_;  // joined by Stop; touched by the owner only
};

}  // namespace clusterkv::client
