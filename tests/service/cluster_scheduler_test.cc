#include "service/cluster_scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>
#include <numeric>
#include <random>
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
  const std::vector<std::byte>& rows() const { return rows_; }
  const std::vector<uint32_t>& positions() const { return positions_; }

 private:
  std::vector<std::byte> rows_;
  std::vector<uint32_t> positions_;
  std::future<absl::StatusOr<ClusterResult>> result_;
};

class ClusterSchedulerTest : public testing::Test {
 protected:
  ClusterSchedulerTest()
      : device_(*gpu::host::HostDevice::Create(1)),
        scheduler_(*ClusterScheduler::Create(device_, slow_log_)) {}
  ~ClusterSchedulerTest() override { device_.cluster.Open(); }

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
  const std::vector<std::byte> before = segment.rows();
  scheduler_->Submit(segment.Job());
  const auto result = segment.Result();
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->heads.size(), 1u);
  const HeadClusters& head = result->heads[0];
  EXPECT_EQ(std::accumulate(head.sizes, head.sizes + head.count, 0u), 64u);
  std::vector<uint32_t> sorted = segment.positions();
  std::ranges::sort(sorted);
  for (uint32_t i = 0; i < 64; ++i) {
    EXPECT_EQ(sorted[i], 100 + i);
    EXPECT_EQ(std::memcmp(&segment.rows()[i * kRowBytes],
                          &before[(segment.positions()[i] - 100) * kRowBytes], kRowBytes),
              0);
  }
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
  const std::vector<std::byte> before = large.rows();
  RunAsOneBatch({&first, &large, &last}, kEnoughForOne);
  EXPECT_TRUE(first.Result().ok());
  EXPECT_TRUE(absl::IsResourceExhausted(large.Result().status()));
  EXPECT_TRUE(last.Result().ok());
  EXPECT_EQ(large.rows(), before);
}

}  // namespace
}  // namespace clusterkv::service
