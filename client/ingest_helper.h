// Hands decoded tokens of direct sequences over to the daemon, so that no decode step waits for it
// (design D3: no stream ever waits for another process). What it sends lies complete in the ring:
// End() has waited for the step's stream.
//
//   DecodeBatch::End ──Submit──► lane of the sequence (first in, first out) ──► IngestTokens
//
// A refused range (RESOURCE_EXHAUSTED) stays at the head of its lane and is offered again, later
// and later; meanwhile the sequence's window fills, and Begin says so. Any other error fails the
// sequence. The ring bounds what can queue.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/status/status.h"
#include "client/deadline.h"
#include "client/ring_allocator.h"
#include "client/sequence_link.h"
#include "clusterkv/v1/sequence.pb.h"

namespace clusterkv::client {

// Thread-safe.
class IngestHelper {
 public:
  // Bounded; called on the helper's thread.
  using Send = std::function<absl::Status(const v1::IngestTokensRequest&)>;

  // `ring` must outlive it.
  IngestHelper(Send send, RingAllocator& ring);
  ~IngestHelper();

  // The range request.ring_offset is the helper's from here on, then the daemon's.
  void Submit(std::shared_ptr<SequenceLink> sequence, v1::IngestTokensRequest request);
  // Offers what the sequence has queued, now, and waits until it is handed over.
  // Errors: RESOURCE_EXHAUSTED (the daemon refused again), DEADLINE_EXCEEDED, why it failed.
  absl::Status Flush(SequenceLink& sequence, const Deadline& deadline);
  // Drops what the sequence has queued; waits for the call that is under way (bounded by Send).
  void Forget(const SequenceLink& sequence);
  // Drops everything and ends the thread. Idempotent.
  void Stop();

 private:
  using Clock = std::chrono::steady_clock;

  struct Lane {
    std::shared_ptr<SequenceLink> sequence;
    std::deque<v1::IngestTokensRequest> queue;
    bool sending = false;  // the head is under way, without the mutex
    uint64_t refusals = 0;
    absl::Status refusal;  // the last one
    std::chrono::milliseconds pause{0};
    Clock::time_point not_before;
  };

  void Run();
  // REQUIRES: mutex_ held.
  Lane* ReadyLane(Clock::time_point* next);
  void Settle(Lane& lane, const absl::Status& status);
  void DropQueue(Lane& lane);

  const Send send_;
  RingAllocator& ring_;

  std::mutex mutex_;
  std::condition_variable work_;     // the thread waits
  std::condition_variable settled_;  // Flush and Forget wait
  // Guarded by mutex_.
  std::map<uint64_t, Lane> lanes_;  // by sequence id
  uint64_t last_served_ = 0;        // lanes take turns
  bool stop_ = false;

  std::thread thread_;  // joined by Stop; touched by the owner only
};

}  // namespace clusterkv::client
