#include "client/audit_helper.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "tests/client/host_arena.h"

namespace clusterkv::client {
namespace {

// Takes what is sent, and holds it up while the gate is closed.
class Receiver {
 public:
  absl::Status Send(const v1::AuditStepRequest& request) {
    std::unique_lock lock(mutex_);
    layers_.push_back(request.layer());
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
    return answer_;
  }
  void AwaitFirst() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !layers_.empty(); });
  }
  void Open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void Answer(absl::Status answer) {
    const std::lock_guard lock(mutex_);
    answer_ = std::move(answer);
  }
  std::vector<uint32_t> layers() {
    const std::lock_guard lock(mutex_);
    return layers_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<uint32_t> layers_;
  bool open_ = false;
  absl::Status answer_;
};

class AuditHelperTest : public testing::Test {
 protected:
  static constexpr uint64_t kSlotBytes = 64;

  AuditSample Step(uint32_t layer) {
    v1::AuditStepRequest request;
    request.set_layer(layer);
    return {.slot = *AuditRing::Take(ring_, kSlotBytes), .request = std::move(request)};
  }
  size_t FreeSlots() {
    std::vector<AuditRing::Slot> taken;
    while (auto slot = AuditRing::Take(ring_, kSlotBytes)) taken.push_back(std::move(*slot));
    return taken.size();
  }

  const std::shared_ptr<AuditRing> ring_ =
      std::make_shared<AuditRing>(HostArena(1, 100 * kSlotBytes));
  Receiver receiver_;
  AuditHelper helper_{
      [this](const v1::AuditStepRequest& request) { return receiver_.Send(request); }};
};

TEST_F(AuditHelperTest, SendsInOrderAndFlushWaitsForAll) {
  for (uint32_t layer = 0; layer < 5; ++layer) helper_.Submit(Step(layer));
  receiver_.AwaitFirst();
  helper_.Flush(Deadline(absl::Milliseconds(1)));
  EXPECT_EQ(receiver_.layers().size(), 1u) << "the deadline has passed, the first is under way";
  receiver_.Open();
  helper_.Flush(Deadline(absl::Seconds(60)));
  EXPECT_EQ(receiver_.layers(), (std::vector<uint32_t>{0, 1, 2, 3, 4}));
}

TEST_F(AuditHelperTest, WhatDoesNotFitIsDropped) {
  helper_.Submit(Step(0));
  receiver_.AwaitFirst();
  for (uint32_t layer = 1; layer < 100; ++layer) helper_.Submit(Step(layer));
  receiver_.Open();
  helper_.Flush(Deadline(absl::Seconds(60)));
  EXPECT_EQ(receiver_.layers().size(), 1u + 32);
  EXPECT_EQ(receiver_.layers().back(), 32u) << "the first are kept";
}

TEST_F(AuditHelperTest, StopDropsWhatIsQueued) {
  helper_.Submit(Step(0));
  receiver_.AwaitFirst();
  helper_.Submit(Step(1));
  std::thread stopping([this] { helper_.Stop(); });
  helper_.Flush(Deadline(absl::Seconds(60)));  // until it stops
  receiver_.Open();
  stopping.join();
  helper_.Submit(Step(2));
  helper_.Stop();
  EXPECT_EQ(receiver_.layers(), std::vector<uint32_t>{0});
  EXPECT_EQ(FreeSlots(), 100u);
}

TEST_F(AuditHelperTest, ASlotIsFreeOnceTheReplyHasCome) {
  helper_.Submit(Step(0));
  receiver_.AwaitFirst();
  EXPECT_EQ(FreeSlots(), 99u) << "the daemon may be reading it";
  receiver_.Answer(absl::NotFoundError("no such sequence"));
  receiver_.Open();
  helper_.Flush(Deadline(absl::Seconds(60)));
  EXPECT_EQ(FreeSlots(), 100u);
}

TEST_F(AuditHelperTest, ASlotWithoutAReplyIsNeverFreeAgain) {
  receiver_.Open();
  receiver_.Answer(absl::DeadlineExceededError("no reply"));
  helper_.Submit(Step(0));
  helper_.Flush(Deadline(absl::Seconds(60)));
  EXPECT_EQ(FreeSlots(), 99u);
}

}  // namespace
}  // namespace clusterkv::client
