#include "client/ingest_helper.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"

namespace clusterkv::client {
namespace {

constexpr std::chrono::milliseconds kFirstPause(5);
constexpr std::chrono::milliseconds kLongestPause(500);

}  // namespace

IngestHelper::IngestHelper(Send send, RingAllocator& ring) : send_(std::move(send)), ring_(ring) {
  thread_ = std::thread([this] { Run(); });
  pthread_setname_np(thread_.native_handle(), "ckv-ingest");
}

IngestHelper::~IngestHelper() { Stop(); }

void IngestHelper::Submit(std::shared_ptr<SequenceLink> sequence, v1::IngestTokensRequest request) {
  const std::lock_guard lock(mutex_);
  Lane& lane = lanes_[sequence->id()];
  lane.sequence = std::move(sequence);
  lane.queue.push_back(std::move(request));
  if (stop_ || !lane.sequence->failure().ok()) DropQueue(lane);
  work_.notify_all();
}

absl::Status IngestHelper::Flush(SequenceLink& sequence, const Deadline& deadline) {
  std::unique_lock lock(mutex_);
  const auto found = lanes_.find(sequence.id());
  if (found == lanes_.end()) return sequence.failure();
  Lane& lane = found->second;
  const uint64_t refusals = lane.refusals;
  lane.not_before = Clock::time_point::min();
  work_.notify_all();
  const bool settled = settled_.wait_until(lock, deadline.time(), [&] {
    return (lane.queue.empty() && !lane.sending) || lane.refusals != refusals || stop_;
  });
  if (absl::Status failure = sequence.failure(); !failure.ok()) return failure;
  if (lane.queue.empty() && !lane.sending) return absl::OkStatus();
  if (stop_) return absl::CancelledError("the client is closed");
  if (settled) return lane.refusal;
  return absl::DeadlineExceededError(
      absl::StrCat("sequence ", sequence.id(), ": decoded tokens were not taken in time"));
}

void IngestHelper::Forget(const SequenceLink& sequence) {
  std::unique_lock lock(mutex_);
  const auto found = lanes_.find(sequence.id());
  if (found == lanes_.end()) return;
  Lane& lane = found->second;
  DropQueue(lane);
  settled_.wait(lock, [&] { return !lane.sending; });
  DropQueue(lane);
  lanes_.erase(sequence.id());
}

void IngestHelper::Stop() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    for (auto& [id, lane] : lanes_) DropQueue(lane);
    work_.notify_all();
    settled_.notify_all();
  }
  thread_.join();
  const std::lock_guard lock(mutex_);
  for (auto& [id, lane] : lanes_) DropQueue(lane);
}

void IngestHelper::Run() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    Clock::time_point next = Clock::now() + std::chrono::hours(1);
    Lane* const lane = ReadyLane(&next);
    if (lane == nullptr) {
      work_.wait_until(lock, next);
      continue;
    }
    lane->sending = true;
    const v1::IngestTokensRequest request = lane->queue.front();
    lock.unlock();
    const absl::Status status = send_(request);
    lock.lock();
    lane->sending = false;
    Settle(*lane, status);
    settled_.notify_all();
  }
}

IngestHelper::Lane* IngestHelper::ReadyLane(Clock::time_point* next) {
  const Clock::time_point now = Clock::now();
  Lane* first = nullptr;
  for (auto& [id, lane] : lanes_) {
    if (lane.queue.empty()) continue;
    if (lane.not_before > now) {
      *next = std::min(*next, lane.not_before);
      continue;
    }
    if (id > last_served_) {
      last_served_ = id;
      return &lane;
    }
    if (first == nullptr) first = &lane;
  }
  if (first != nullptr) last_served_ = first->sequence->id();
  return first;
}

void IngestHelper::Settle(Lane& lane, const absl::Status& status) {
  if (status.ok()) {
    lane.queue.pop_front();
    lane.pause = {};
    return;
  }
  if (absl::IsResourceExhausted(status)) {
    ++lane.refusals;
    lane.refusal = status;
    lane.pause = std::clamp(lane.pause * 2, kFirstPause, kLongestPause);
    lane.not_before = Clock::now() + lane.pause;
    return;
  }
  lane.sequence->Fail(status);
  // The daemon may have the head: its range comes back by credit or not at all.
  if (MayHaveHappened(status)) lane.queue.pop_front();
  DropQueue(lane);
}

void IngestHelper::DropQueue(Lane& lane) {
  while (lane.queue.size() > (lane.sending ? 1u : 0u)) {
    ring_.Release(lane.queue.back().ring_offset());
    lane.queue.pop_back();
  }
}

}  // namespace clusterkv::client
