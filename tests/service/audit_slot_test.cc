#include "service/audit_slot.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "gpu/audit_layout.h"
#include "gpu/host/host_device.h"

namespace clusterkv::service {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr uint32_t kSinks = 4;
constexpr uint32_t kLayer = 1;

// Two layers, two KV heads with three query heads each. Two segments: positions 4 to 9 and 10
// to 13.
class AuditSlotTest : public testing::Test {
 protected:
  AuditSlotTest() {
    const gpu::Shape shape{.layers = 2, .kv_heads = 2, .q_heads = 6, .head_dim = 64};
    gpu::MethodOptions method;
    method.sink_tokens = kSinks;
    method.tokens_per_cluster = 2;
    method.prompt_segment_tokens = 6;
    method.decode_segment_tokens = 4;
    method.budget_tokens = 5;
    layout_ = *gpu::StateLayout::Create(shape, method.Resolved(shape), 32);
    device_ = *gpu::host::HostDevice::Create(1);
    stream_ = *device_->CreateStream("test");
    state_.resize(layout_.total_bytes);
    slot_.resize(audit().bytes);
    // Three clusters of two rows, then two of them; the second head's other way round.
    positions_ = {{{4, 7, 5, 9, 6, 8}, {10, 12, 11, 13}}, {{8, 9, 6, 7, 4, 5}, {12, 13, 10, 11}}};
    for (uint32_t head = 0; head < 2; ++head) {
      auto* const entries = gpu::At<gpu::ClusterEntry>(state_.data(), layout_.clusters) +
                            layout_.head_index(kLayer, head) * layout_.max_clusters;
      for (uint32_t i = 0; i < 5; ++i) {
        entries[i] = {.first_row = 2 * i, .tokens = 2, .chunk = 0, .chunk_offset = 0};
      }
    }
    *Words(audit().cut) = 14;
    for (uint32_t q = 0; q < 6; ++q) {
      gpu::At<float>(slot_.data(), audit().lse)[q] = static_cast<float>(q);
    }
    for (size_t i = 0; i < 6 * audit().query_bytes; ++i) {
      slot_[audit().queries + i] = static_cast<std::byte>(i % 251);
    }
  }

  gpu::AuditLayout audit() const { return gpu::AuditLayout(layout_); }
  uint32_t* Words(uint64_t offset) { return gpu::At<uint32_t>(slot_.data(), offset); }
  void Choose(uint32_t head, const std::vector<std::pair<uint32_t, uint32_t>>& clusters) {
    Words(audit().counts)[head] = static_cast<uint32_t>(clusters.size());
    for (size_t i = 0; i < clusters.size(); ++i) {
      Words(audit().clusters)[head * audit().choices + i] = clusters[i].first;
      Words(audit().takes)[head * audit().choices + i] = clusters[i].second;
    }
  }

  absl::Status Read() {
    step_ = AuditStep();
    step_.candidates_begin = kSinks;
    step_.candidates_end = 14;
    for (const auto& head : positions_) {
      step_.runs.emplace_back();
      for (const std::vector<uint32_t>& run : head) {
        step_.runs.back().push_back({.rows = nullptr,
                                     .positions = run.data(),
                                     .tokens = static_cast<uint32_t>(run.size())});
      }
    }
    return ReadAuditSlot(*stream_,
                         {.layout = &layout_,
                          .state = state_.data(),
                          .slot = slot_.data(),
                          .layer = kLayer,
                          .published_clusters = {5, 5}},
                         step_);
  }

  gpu::StateLayout layout_ = {};
  std::unique_ptr<gpu::Device> device_;
  std::unique_ptr<gpu::Stream> stream_;
  std::vector<std::byte> state_, slot_;
  std::vector<std::vector<std::vector<uint32_t>>> positions_;  // [kv_heads][segments][rows]
  AuditStep step_;
};

TEST_F(AuditSlotTest, ClustersBecomePositions) {
  Choose(0, {{3, 2}, {1, 1}});
  Choose(1, {{2, 2}, {4, 2}, {0, 1}});
  ASSERT_TRUE(Read().ok());
  EXPECT_THAT(step_.chosen, ElementsAre(ElementsAre(10, 12, 5), ElementsAre(4, 5, 10, 11, 8)));
  EXPECT_EQ(step_.candidates_end, 14u);
  EXPECT_THAT(step_.lse, ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_TRUE(std::ranges::equal(
      step_.queries, absl::MakeConstSpan(&slot_[audit().queries], 6 * audit().query_bytes)));
}

TEST_F(AuditSlotTest, EndsTheCandidatesAtTheCut) {
  Choose(0, {{2, 2}});
  *Words(audit().cut) = 10;
  ASSERT_TRUE(Read().ok());
  EXPECT_THAT(step_.chosen, ElementsAre(ElementsAre(6, 8), IsEmpty()));
  EXPECT_EQ(step_.candidates_end, 10u);
  for (const auto& runs : step_.runs) EXPECT_EQ(runs.size(), 1u);
  Choose(0, {});
  *Words(audit().cut) = kSinks;
  ASSERT_TRUE(Read().ok());
  EXPECT_EQ(step_.candidates_end, kSinks);
  for (const auto& runs : step_.runs) EXPECT_TRUE(runs.empty());
}

TEST_F(AuditSlotTest, ATakeMayReachTheLastRowOnly) {
  Choose(1, {{4, 2}});
  EXPECT_TRUE(Read().ok());
  Choose(1, {{4, 3}});
  EXPECT_EQ(Read().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(AuditSlotTest, ThePositionsInTheHostStoreAreNotTrustedEither) {
  Choose(0, {{0, 2}});
  for (const uint32_t damaged : {0u, 14u, UINT32_MAX, 4u}) {
    positions_[0][0][1] = damaged;
    EXPECT_EQ(Read().code(), absl::StatusCode::kInvalidArgument) << damaged;
  }
}

}  // namespace
}  // namespace clusterkv::service
