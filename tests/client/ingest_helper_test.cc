#include "client/ingest_helper.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace clusterkv::client {
namespace {

Deadline Soon() { return Deadline(absl::Seconds(30)); }

// The daemon's side: answers in the order that the test gives, then OK.
class FakeSender {
 public:
  IngestHelper::Send Function() {
    return [this](const v1::IngestTokensRequest& request) { return Take(request); };
  }
  void Answer(absl::Status status) {
    const std::lock_guard lock(mutex_);
    answers_.push_back(std::move(status));
  }
  // Calls wait from here on until Open.
  void Hold() {
    const std::lock_guard lock(mutex_);
    held_ = true;
  }
  void Open() {
    const std::lock_guard lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }
  void WaitForCalls(size_t count) {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(30),
                                  [&] { return positions_.size() >= count; }));
  }
  std::vector<uint32_t> positions() {
    const std::lock_guard lock(mutex_);
    return positions_;
  }

 private:
  absl::Status Take(const v1::IngestTokensRequest& request) {
    std::unique_lock lock(mutex_);
    positions_.push_back(request.position());
    changed_.notify_all();
    changed_.wait(lock, [this] { return !held_; });
    if (answers_.empty()) return absl::OkStatus();
    absl::Status answer = answers_.front();
    answers_.erase(answers_.begin());
    return answer;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::vector<absl::Status> answers_;
  std::vector<uint32_t> positions_;
  bool held_ = false;
};

class IngestHelperTest : public testing::Test {
 protected:
  IngestHelperTest()
      : ring_(64 * 16),
        link_(std::make_shared<SequenceLink>(1, 0)),
        other_(std::make_shared<SequenceLink>(2, 0)),
        helper_(sender_.Function(), ring_) {}

  void Submit(const std::shared_ptr<SequenceLink>& link, uint32_t position) {
    v1::IngestTokensRequest request;
    request.set_sequence_id(link->id());
    request.set_position(position);
    request.set_ring_offset(*ring_.Allocate(64, Deadline(absl::ZeroDuration())));
    helper_.Submit(link, std::move(request));
  }
  // The call under way ends only after the queue behind it was dropped.
  void OpenOnceOneRangeIsLeft() {
    const Deadline deadline(absl::Seconds(30));
    while (used_ranges() > 1 && !deadline.passed()) std::this_thread::yield();
    sender_.Open();
  }
  uint64_t used_ranges() const { return (ring_.bytes() - ring_.free_bytes()) / 64; }

  RingAllocator ring_;
  FakeSender sender_;
  std::shared_ptr<SequenceLink> link_, other_;
  IngestHelper helper_;
};

TEST_F(IngestHelperTest, SendsInOrderAndLeavesRangesToTheDaemon) {
  for (uint32_t i = 0; i < 5; ++i) Submit(link_, i);
  EXPECT_TRUE(helper_.Flush(*link_, Soon()).ok());
  EXPECT_EQ(sender_.positions(), (std::vector<uint32_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(used_ranges(), 5u);  // until the daemon's credit
}

TEST_F(IngestHelperTest, OffersARefusedRangeAgain) {
  sender_.Answer(absl::ResourceExhaustedError("pool"));
  sender_.Answer(absl::ResourceExhaustedError("pool"));
  Submit(link_, 7);
  Submit(link_, 8);
  sender_.WaitForCalls(4);
  EXPECT_TRUE(helper_.Flush(*link_, Soon()).ok());
  EXPECT_EQ(sender_.positions(), (std::vector<uint32_t>{7, 7, 7, 8}));
  EXPECT_TRUE(link_->failure().ok());
}

TEST_F(IngestHelperTest, FlushReportsTheRefusal) {
  sender_.Hold();
  for (int i = 0; i < 50; ++i) sender_.Answer(absl::ResourceExhaustedError("pool"));
  Submit(link_, 7);
  sender_.WaitForCalls(1);
  auto open = std::jthread([this] { sender_.Open(); });
  EXPECT_EQ(helper_.Flush(*link_, Soon()), absl::ResourceExhaustedError("pool"));
}

TEST_F(IngestHelperTest, FlushHasADeadline) {
  sender_.Hold();
  Submit(link_, 0);
  EXPECT_TRUE(absl::IsDeadlineExceeded(helper_.Flush(*link_, Deadline(absl::Milliseconds(20)))));
  sender_.Open();
}

TEST_F(IngestHelperTest, ErrorFailsItsSequenceAndFreesWhatWasNotTaken) {
  sender_.Hold();
  sender_.Answer(absl::NotFoundError("no such sequence"));
  Submit(link_, 0);
  Submit(link_, 1);
  sender_.WaitForCalls(1);
  Submit(other_, 0);
  sender_.Open();
  EXPECT_TRUE(absl::IsNotFound(helper_.Flush(*link_, Soon())));
  EXPECT_TRUE(helper_.Flush(*other_, Soon()).ok());
  EXPECT_TRUE(absl::IsNotFound(link_->failure()));
  EXPECT_TRUE(other_->failure().ok());
  EXPECT_EQ(used_ranges(), 1u);  // the other's
  // What comes after the failure is dropped.
  Submit(link_, 2);
  EXPECT_EQ(used_ranges(), 1u);
}

TEST_F(IngestHelperTest, KeepsARangeThatTheDaemonMayHave) {
  sender_.Answer(absl::DeadlineExceededError("slow"));
  Submit(link_, 0);
  EXPECT_TRUE(absl::IsDeadlineExceeded(helper_.Flush(*link_, Soon())));
  EXPECT_EQ(used_ranges(), 1u);
}

TEST_F(IngestHelperTest, RefusedSequenceDoesNotHoldUpAnother) {
  sender_.Hold();
  for (int i = 0; i < 50; ++i) sender_.Answer(absl::ResourceExhaustedError("pool"));
  Submit(link_, 1);
  sender_.WaitForCalls(1);
  Submit(other_, 2);
  sender_.Open();
  sender_.WaitForCalls(2);
  EXPECT_EQ(sender_.positions()[1], 2u);
}

TEST_F(IngestHelperTest, ForgetDropsTheQueueAfterTheCallUnderWay) {
  sender_.Hold();
  for (uint32_t i = 0; i < 3; ++i) Submit(link_, i);
  sender_.WaitForCalls(1);
  auto open = std::jthread([this] { OpenOnceOneRangeIsLeft(); });
  helper_.Forget(*link_);
  EXPECT_LE(sender_.positions().size(), 1u);
  EXPECT_EQ(used_ranges(), 1u);
  EXPECT_TRUE(helper_.Flush(*link_, Soon()).ok());
}

TEST_F(IngestHelperTest, StopGivesBackWhatIsQueued) {
  sender_.Hold();
  for (uint32_t i = 0; i < 3; ++i) Submit(link_, i);
  sender_.WaitForCalls(1);
  auto open = std::jthread([this] { OpenOnceOneRangeIsLeft(); });
  helper_.Stop();
  EXPECT_EQ(used_ranges(), 1u);
  Submit(link_, 9);
  EXPECT_EQ(used_ranges(), 1u);
}

}  // namespace
}  // namespace clusterkv::client
