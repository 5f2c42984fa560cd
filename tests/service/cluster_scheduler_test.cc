#include "service/cluster_scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "gpu/host/host_device.h"
#include "gpu/segment_plan.h"
#include "tests/gpu/seed.h"
#include "tests/service/gated_device.h"

namespace clusterkv::service {
namespace {

constexpr uint32_t kHeadDim = 64;
constexpr size_t kRowBytes = size_t{2} * kHeadDim * sizeof(float);
// A job of 64 tokens gets its workspace, one of 128 or a batch of two do not.
constexpr size_t kEnoughForOne = 64 * kRowBytes + 4096;

// The staged rows of one segment of one head, and what becomes of them.
class Segment {
 public:
  Segment(uint32_t tokens, uint64_t seed) : rows_(tokens * kRowBytes), positions_(tokens) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < rows_.size(); i += sizeof(float)) {
      const float value = normal(random);
      std::memcpy(&rows_[i], &value, sizeof(value));
    }
    staged_ = rows_;
  }

  ClusterJob Job() {
    gpu::MethodOptions method;
    method.tokens_per_cluster = 8;
    const auto tokens = static_cast<uint32_t>(positions_.size());
    auto done = std::make_shared<std::promise<absl::StatusOr<ClusterResult>>>();
    result_ = done->get_future();
    return {.tokens = tokens,
            .first_position = 100,
            .clusters = gpu::ClustersOfSegment(method, tokens),
            .max_clusters = gpu::MaxClustersOfSegment(method, tokens),
            .head_dim = kHeadDim,
            .dtype = gpu::DType::kFp32,
            .iterations = 3,
            .largest_cluster_tokens = method.largest_cluster_tokens(),
            .center_keys = false,
            .heads = {{.rows = rows_.data(), .positions = positions_.data(), .seed = 7}},
            .done = [done](absl::StatusOr<ClusterResult> result) {
              done->set_value(std::move(result));
            }};
  }

  absl::StatusOr<ClusterResult> Result() { return result_.get(); }
  bool done() const {
    return result_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }
  const std::vector<std::byte>& rows() const { return rows_; }
  const std::vector<std::byte>& staged() const { return staged_; }  // rows as they were
  const std::vector<uint32_t>& positions() const { return positions_; }

 private:
  std::vector<std::byte> rows_, staged_;
  std::vector<uint32_t> positions_;
  std::future<absl::StatusOr<ClusterResult>> result_;
};

// Waits for it.
void ExpectClusterOrder(Segment& segment) {
  const auto result = segment.Result();
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->heads.size(), 1u);
  const HeadClusters& head = result->heads[0];
  EXPECT_EQ(std::accumulate(head.sizes, head.sizes + head.count, size_t{0}),
            segment.positions().size());
  std::vector<uint32_t> sorted = segment.positions();
  std::ranges::sort(sorted);
  for (uint32_t i = 0; i < sorted.size(); ++i) {
    EXPECT_EQ(sorted[i], 100 + i);
    EXPECT_EQ(std::memcmp(&segment.rows()[i * kRowBytes],
                          &segment.staged()[(segment.positions()[i] - 100) * kRowBytes], kRowBytes),
              0);
  }
  EXPECT_GT(result->permute_seconds, 0);
  EXPECT_GE(result->seconds, result->permute_seconds);
}

class ClusterSchedulerTest : public testing::Test {
 protected:
  ClusterSchedulerTest()
      : device_(*gpu::host::HostDevice::Create(1)),
        scheduler_(*ClusterScheduler::Create(device_, slow_log_)) {}
  ~ClusterSchedulerTest() override {
    device_.cluster.Open();
    device_.permute.Open();
    device_.refused.Open();
  }

  // Its k-means waits at the gate; so will its rows before they are offloaded.
  void HoldClustering(Segment& first) {
    device_.cluster.Close();
    device_.permute.Close();
    scheduler_->Submit(first.Job());
    device_.cluster.AwaitArrival();
  }

  // The first's rows wait at the gate, and so does the second's k-means. Returns a time between
  // their submissions.
  std::chrono::steady_clock::time_point HoldBothStages(Segment& first, Segment& second) {
    HoldClustering(first);
    const auto between = std::chrono::steady_clock::now();
    scheduler_->Submit(second.Job());  // too late for the first's batch, in time for the next turn
    device_.cluster.Admit();
    device_.cluster.AwaitArrival();
    device_.permute.AwaitArrival();
    return between;
  }

  // While the first, which is at HoldClustering, is being offloaded, the second gets no memory.
  void RefuseDuringOffload(const Segment& first, Segment& second) {
    device_.refused.Close();
    scheduler_->Submit(second.Job());
    device_.cluster.Open();
    device_.refused.AwaitArrival();
    EXPECT_FALSE(first.done());
    device_.refused.Open();
    device_.permute.Open();
  }

  void OpenBothStages() {
    device_.cluster.Open();
    device_.permute.Open();
  }

  // REQUIRES: the scheduler's thread is held. A stopping queue drops what comes, so its length
  // tells.
  void AwaitStopping() {
    size_t waiting;
    do {
      std::this_thread::yield();
      waiting = scheduler_->thread_load().waiting;
      scheduler_->Publish({}, [](const absl::Status&) {});
    } while (scheduler_->thread_load().waiting != waiting);
  }

  // Submits all as one batch, for which no allocation is above `largest` bytes.
  void RunAsOneBatch(const std::vector<Segment*>& segments, size_t largest) {
    Segment before(8, 1);
    device_.cluster.Close();
    scheduler_->Submit(before.Job());
    device_.cluster.AwaitArrival();
    for (Segment* const segment : segments) scheduler_->Submit(segment->Job());
    device_.largest_allocation = largest;
    device_.cluster.Open();
    EXPECT_TRUE(before.Result().ok());
  }

  GatedDevice device_;
  SlowLog slow_log_{absl::ZeroDuration()};
  std::unique_ptr<ClusterScheduler> scheduler_;
};

TEST_F(ClusterSchedulerTest, PutsRowsIntoClusterOrder) {
  const uint64_t seed = gpu::TestSeed();
  SCOPED_TRACE(gpu::SeedTrace(seed));
  Segment segment(64, seed);
  scheduler_->Submit(segment.Job());
  ExpectClusterOrder(segment);
}

TEST_F(ClusterSchedulerTest, JobsRunAloneWhereABatchGetsNoMemory) {
  std::vector<std::unique_ptr<Segment>> together, alone;
  std::vector<Segment*> together_pointers, alone_pointers;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    together_pointers.push_back(together.emplace_back(new Segment(64, seed)).get());
    alone_pointers.push_back(alone.emplace_back(new Segment(64, seed)).get());
  }
  RunAsOneBatch(together_pointers, SIZE_MAX);
  for (Segment* const segment : together_pointers) EXPECT_TRUE(segment->Result().ok());
  RunAsOneBatch(alone_pointers, kEnoughForOne);
  for (size_t i = 0; i < alone.size(); ++i) {
    const auto result = alone[i]->Result();
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(alone[i]->positions(), together[i]->positions());
    EXPECT_EQ(alone[i]->rows(), together[i]->rows());
  }
}

TEST_F(ClusterSchedulerTest, AJobThatGetsNoMemoryFailsAloneAndUntouched) {
  Segment first(64, 1), large(128, 2), last(64, 3);
  RunAsOneBatch({&first, &large, &last}, kEnoughForOne);
  EXPECT_TRUE(first.Result().ok());
  EXPECT_TRUE(absl::IsResourceExhausted(large.Result().status()));
  EXPECT_TRUE(last.Result().ok());
  EXPECT_EQ(large.rows(), large.staged());
}

TEST_F(ClusterSchedulerTest, ABatchIsClusteredWhileTheOneBeforeIsOffloaded) {
  Segment first(64, 1), second(128, 2);
  HoldBothStages(first, second);
  EXPECT_FALSE(first.done());
  EXPECT_EQ(first.rows(), first.staged());
  OpenBothStages();
  ExpectClusterOrder(first);
  ExpectClusterOrder(second);
}

TEST_F(ClusterSchedulerTest, LoadCountsBothStages) {
  Segment first(64, 1), second(64, 2), third(64, 3);
  const auto between = HoldBothStages(first, second);
  scheduler_->Submit(third.Job());
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - between;
  ClusterLoad load = scheduler_->load();
  EXPECT_EQ(load.running_jobs, 2u);
  EXPECT_EQ(load.waiting_jobs, 1u);
  EXPECT_EQ(load.batches, 2u);
  EXPECT_GE(load.oldest_seconds, elapsed.count()) << "the first is the oldest";
  OpenBothStages();
  scheduler_->Stop();
  load = scheduler_->load();
  EXPECT_EQ(load.running_jobs, 0u);
  EXPECT_EQ(load.waiting_jobs, 0u);
  EXPECT_EQ(load.batches, 3u);
  EXPECT_EQ(load.oldest_seconds, 0);
  for (Segment* const segment : {&first, &second, &third}) ExpectClusterOrder(*segment);
}

TEST_F(ClusterSchedulerTest, ABatchWithoutMemoryWaitsForTheOneBefore) {
  Segment first(64, 1), second(128, 2);
  HoldClustering(first);
  device_.memory_limit = device_.allocated() + 128 * kRowBytes;  // and the second's counts
  RefuseDuringOffload(first, second);
  ExpectClusterOrder(first);
  ExpectClusterOrder(second);
}

TEST_F(ClusterSchedulerTest, ABatchThatGetsNoMemoryFailsAfterTheOneBefore) {
  Segment first(64, 1), second(128, 2);
  HoldClustering(first);
  device_.largest_allocation = kEnoughForOne;
  RefuseDuringOffload(first, second);
  EXPECT_TRUE(absl::IsResourceExhausted(second.Result().status()));
  EXPECT_TRUE(first.done());
  ExpectClusterOrder(first);
  EXPECT_EQ(second.rows(), second.staged());
}

TEST_F(ClusterSchedulerTest, FailedClusteringLeavesTheBatchBeforeAlone) {
  Segment first(64, 1), second(64, 2), third(64, 3);
  HoldBothStages(first, second);
  device_.fail_cluster = true;
  OpenBothStages();
  EXPECT_TRUE(absl::IsInternal(second.Result().status()));
  EXPECT_TRUE(first.done()) << "batches end in order";
  ExpectClusterOrder(first);
  device_.fail_cluster = false;
  scheduler_->Submit(third.Job());
  ExpectClusterOrder(third);
}

TEST_F(ClusterSchedulerTest, FailedOffloadLeavesTheNextBatchAlone) {
  Segment first(64, 1), second(64, 2);
  device_.fail_permute = true;
  HoldBothStages(first, second);
  device_.fail_permute = false;
  OpenBothStages();
  EXPECT_TRUE(absl::IsInternal(first.Result().status()));
  ExpectClusterOrder(second);
}

TEST_F(ClusterSchedulerTest, StopFinishesBothStages) {
  Segment first(64, 1), second(64, 2);
  HoldBothStages(first, second);
  std::thread stopper([this] { scheduler_->Stop(); });
  AwaitStopping();
  OpenBothStages();
  stopper.join();
  EXPECT_TRUE(first.done());
  EXPECT_TRUE(second.done());
  ExpectClusterOrder(first);
  ExpectClusterOrder(second);
}

TEST_F(ClusterSchedulerTest, StopFinishesABatchThatNoOtherTurnFollows) {
  Segment segment(64, 1);
  HoldClustering(segment);
  std::thread stopper([this] { scheduler_->Stop(); });
  AwaitStopping();  // no turn can be added any more
  OpenBothStages();
  stopper.join();
  ASSERT_TRUE(segment.done());
  ExpectClusterOrder(segment);
}

}  // namespace
}  // namespace clusterkv::service
