// A ServiceCore over the host device, a small pool, a clock that stands still, and workers that
// are no processes: their sinks record, and answer as a client would unless told not to.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gpu/mapping.h"
#include "service/core.h"
#include "tests/service/gated_device.h"
#include "tests/service/temporary_pool.h"

namespace clusterkv::service {

// The answer to one call. A second answer ends the test program.
template <typename T>
class Reply {
 public:
  Completion<T> done() {
    return
        [promise = promise_](absl::StatusOr<T> result) { promise->set_value(std::move(result)); };
  }
  bool ready() const {
    return future_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }
  absl::StatusOr<T> Get() const {
    if (future_.wait_for(std::chrono::seconds(60)) == std::future_status::ready) {
      return future_.get();
    }
    return absl::DeadlineExceededError("no answer within a minute");
  }

 private:
  std::shared_ptr<std::promise<absl::StatusOr<T>>> promise_ =
      std::make_shared<std::promise<absl::StatusOr<T>>>();
  std::shared_future<absl::StatusOr<T>> future_ = promise_->get_future().share();
};

// What a worker has been told; guarded by its mutex.
struct Told {
  std::map<uint64_t, uint64_t> credits;  // ring offset -> times returned
  size_t credit_count = 0;
  std::map<SequenceId, PublishedInfo> published;
  std::map<SequenceId, absl::Status> failed;
  size_t draining = 0;
  std::vector<absl::Status> ended;
  std::map<ArenaId, std::shared_ptr<gpu::Mapping>> arenas;
  std::set<ArenaId> revoked_arenas;
  std::set<uint32_t> chunks, revoked_chunks;
  size_t session_ended = 0;
};

class FakeWorker : public SessionSink, public AttachSink {
 public:
  explicit FakeWorker(ServiceCore& core) : core_(core) {}

  void CreditReturned(ArenaId arena, uint64_t offset, uint64_t bytes) override;
  void SegmentPublished(SequenceId sequence, PublishedInfo info) override;
  void SequenceFailed(SequenceId sequence, const absl::Status& why) override;
  void Draining(uint64_t deadline_milliseconds) override;
  void Ended(const absl::Status& why) override;
  void GrantArena(ArenaId arena, uint64_t bytes, int fd) override;
  void RevokeArena(ArenaId arena) override;
  void GrantChunk(uint32_t chunk, uint64_t bytes, int fd) override;
  void RevokeChunk(uint32_t chunk) override;
  void SessionEnded() override;

  // Waits, at most a minute, until `condition` holds for what it was told.
  testing::AssertionResult Await(const std::function<bool(const Told&)>& condition);
  Told told() const;
  std::byte* arena_data(ArenaId arena) const;

  SessionKey key;
  SessionId session = 0;
  ArenaId ring = 0;
  uint64_t next_key = 1;
  // Whether it says at once that it has mapped, or unmapped, a chunk.
  std::atomic<bool> maps_chunks = true, unmaps_chunks = true;

 private:
  void Tell(const std::function<void(Told&)>& change);

  ServiceCore& core_;
  mutable std::mutex mu_;
  std::condition_variable changed_;  // with mu_
  Told told_;                        // guarded by mu_
};

class CoreTest : public testing::Test {
 protected:
  static constexpr uint64_t kChunk = 64 << 10;
  static constexpr uint64_t kRing = 256 << 10;
  static constexpr uint64_t kEpoch = 77;
  using Worker = std::shared_ptr<FakeWorker>;

  explicit CoreTest(uint32_t chunks = 32, bool new_files = false);
  ~CoreTest() override;
  void StartCore(CoreOptions options = {});

  static HelloInfo Hello();
  absl::Status OpenOn(GrantId grant);         // a session that nobody hears of
  Worker Open(GrantId grant = kNoGrant);      // a session that has not attached
  Worker Attached(GrantId grant = kNoGrant);  // with a ring
  absl::StatusOr<SessionId> Attach(const Worker& worker, SessionKey key);
  absl::StatusOr<ArenaInfo> AllocateArena(const Worker& worker, uint64_t bytes);

  // Two layers, one KV head, two query heads; segments of 32 and 16 tokens, window 8, sinks 4.
  static RegisterRequest Request(FetchMode mode, uint64_t key);
  absl::StatusOr<RegisterReply> Register(const Worker& worker, const RegisterRequest& request);
  SequenceId MustRegister(const Worker& worker, FetchMode mode);

  // A range of all layers at the ring's start.
  static IngestRequest Range(const Worker& worker, SequenceId sequence, uint32_t position,
                             uint32_t count, bool end_of_prompt);
  absl::StatusOr<uint32_t> Ingest(const Worker& worker, const IngestRequest& request);
  // One range, and its credit.
  void MustIngest(const Worker& worker, SequenceId sequence, uint32_t position, uint32_t count,
                  bool end_of_prompt);
  absl::StatusOr<PublishedInfo> Wait(const Worker& worker, SequenceId sequence, uint32_t length);
  static FetchRequest Fetch(SequenceId sequence, uint32_t position, uint32_t layer);
  absl::StatusOr<std::vector<FetchResult>> DoFetch(const Worker& worker, FetchRequest request);
  absl::StatusOr<bool> Release(const Worker& worker, SequenceId sequence);
  std::vector<SequenceStatus> Sequences();

  // Until all that was posted to the core before has run there.
  void Fence();
  // Waits, at most a minute, for a status.
  testing::AssertionResult AwaitStatus(const std::function<bool(const DaemonStatus&)>& condition);
  testing::AssertionResult AwaitNothingHeld();
  void Advance(absl::Duration duration) { now_ += absl::ToInt64Nanoseconds(duration); }

  std::atomic<int64_t> now_ = 1'000'000'000;  // nanoseconds
  TemporaryPool pool_;
  GatedDevice* device_ = nullptr;  // the core's
  std::unique_ptr<ServiceCore> core_;
};

}  // namespace clusterkv::service
