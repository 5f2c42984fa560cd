#include "client/audit_helper.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <vector>

namespace clusterkv::client {
namespace {

// Takes what is sent, and holds it up while the gate is closed.
class Receiver {
 public:
  void Send(const v1::AuditStepRequest& request) {
    std::unique_lock lock(mutex_);
    layers_.push_back(request.layer());
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
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
  std::vector<uint32_t> layers() {
    const std::lock_guard lock(mutex_);
    return layers_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<uint32_t> layers_;
  bool open_ = false;
};

v1::AuditStepRequest Step(uint32_t layer) {
  v1::AuditStepRequest request;
  request.set_layer(layer);
  return request;
}

TEST(AuditHelper, SendsInOrderAndFlushWaitsForAll) {
  Receiver receiver;
  AuditHelper helper([&](const v1::AuditStepRequest& request) { receiver.Send(request); });
  for (uint32_t layer = 0; layer < 5; ++layer) helper.Submit(Step(layer));
  receiver.AwaitFirst();
  helper.Flush(Deadline(absl::Milliseconds(1)));
  EXPECT_EQ(receiver.layers().size(), 1u) << "the deadline has passed, the first is under way";
  receiver.Open();
  helper.Flush(Deadline(absl::Seconds(60)));
  EXPECT_EQ(receiver.layers(), (std::vector<uint32_t>{0, 1, 2, 3, 4}));
}

TEST(AuditHelper, WhatDoesNotFitIsDropped) {
  Receiver receiver;
  AuditHelper helper([&](const v1::AuditStepRequest& request) { receiver.Send(request); });
  helper.Submit(Step(0));
  receiver.AwaitFirst();
  for (uint32_t layer = 1; layer < 100; ++layer) helper.Submit(Step(layer));
  receiver.Open();
  helper.Flush(Deadline(absl::Seconds(60)));
  EXPECT_EQ(receiver.layers().size(), 1u + 32);
  EXPECT_EQ(receiver.layers().back(), 32u) << "the first are kept";
}

TEST(AuditHelper, StopDropsWhatIsQueued) {
  Receiver receiver;
  receiver.Open();
  AuditHelper helper([&](const v1::AuditStepRequest& request) { receiver.Send(request); });
  helper.Stop();
  helper.Submit(Step(0));
  helper.Flush(Deadline(absl::Seconds(60)));
  helper.Stop();
  EXPECT_TRUE(receiver.layers().empty());
}

}  // namespace
}  // namespace clusterkv::client
