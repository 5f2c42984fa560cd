#include "client/step_audit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <numeric>
#include <vector>

#include "absl/types/span.h"
#include "gpu/audit_layout.h"
#include "tests/client/host_arena.h"
#include "tests/client/immediate_stream.h"

namespace clusterkv::client {
namespace {

using testing::ElementsAre;

// Batches of two sequences of two layers, two KV heads, four query heads.
class StepAuditTest : public testing::Test {
 protected:
  static constexpr uint32_t kDim = 64;
  static constexpr uint32_t kBudget = 40;

  StepAuditTest() {
    gpu::MethodOptions method;
    method.tokens_per_cluster = 4;
    method.prompt_segment_tokens = 64;
    method.budget_tokens = kBudget;
    layout_ = *gpu::StateLayout::Create(kShape, method.Resolved(kShape), 100);
    state_.resize(layout_.total_bytes);
    queries_.resize(size_t{2} * 4 * 2 * kDim);  // of two sequences, heads two rows apart
    std::iota(queries_.begin(), queries_.end(), 0.0f);
    ring_ = std::make_shared<AuditRing>(HostArena(7, Layout().bytes));  // one slot
  }

  gpu::AuditLayout Layout() const { return gpu::AuditLayout(layout_); }
  std::unique_ptr<StepAudit> Audit(double rate) {
    return std::make_unique<StepAudit>(kShape, 2, rate,
                                       std::make_unique<HostBytes>(2 * 4 * sizeof(float)), ring_);
  }
  gpu::BatchSlot slot() { return {.state = state_.data(), .layout = &layout_}; }
  gpu::QuerySource queries() const {
    return {.q = reinterpret_cast<const std::byte*>(queries_.data()),
            .batch_stride = size_t{4} * 2 * kDim * sizeof(float),
            .head_stride = size_t{2} * kDim * sizeof(float)};
  }
  // What a step leaves of the layer that was attended last.
  void FillState(uint32_t cut) {
    gpu::At<gpu::StepLatch>(state_.data(), layout_.latch)->cut = cut;
    for (uint32_t head = 0; head < 2; ++head) {
      gpu::At<uint32_t>(state_.data(), layout_.selected_count)[head] = 2 + head;
      for (uint32_t i = 0; i < kBudget; ++i) {
        const uint32_t at = head * kBudget + i;
        gpu::At<uint32_t>(state_.data(), layout_.selected_cluster)[at] = 1000 * (head + 1) + i;
        gpu::At<uint32_t>(state_.data(), layout_.selected_take)[at] = 5000 * (head + 1) + i;
      }
    }
  }
  template <typename T>
  static absl::Span<const T> In(const AuditSample& sample, uint64_t offset, size_t count) {
    return {gpu::At<T>(sample.slot.data(), offset), count};
  }

  static constexpr gpu::Shape kShape{
      .layers = 2, .kv_heads = 2, .q_heads = 4, .head_dim = kDim, .dtype = gpu::DType::kFp32};
  gpu::StateLayout layout_ = {};
  std::vector<std::byte> state_;
  std::vector<float> queries_;
  std::shared_ptr<AuditRing> ring_;
  ImmediateStream stream_;
};

TEST_F(StepAuditTest, SequencesAndLayersTakeTurns) {
  const auto audit = Audit(0.5);
  std::vector<std::pair<size_t, uint32_t>> wanted;
  for (int step = 0; step < 10; ++step) {
    audit->Begin();
    for (uint32_t layer = 0; layer < 2; ++layer) {
      if (audit->wants(layer)) wanted.emplace_back(audit->index(), layer);
    }
  }
  using Turn = std::pair<size_t, uint32_t>;
  EXPECT_THAT(wanted, ElementsAre(Turn(0, 0), Turn(0, 1), Turn(1, 0), Turn(1, 1), Turn(0, 0)));
}

TEST_F(StepAuditTest, LeavesWhatTheStepSawInASlot) {
  const auto audit = Audit(1);
  for (int step = 0; step < 3; ++step) audit->Begin();  // the second sequence's turn
  ASSERT_EQ(audit->index(), 1u);
  ASSERT_TRUE(audit->wants(0));
  const gpu::AttentionTarget target = audit->WithLse({});
  std::iota(target.lse, target.lse + 8, 100.0f);
  FillState(52);
  ASSERT_TRUE(audit->Take(stream_, slot(), queries(), target).ok());
  EXPECT_EQ(stream_.synchronized, 0u) << "no step waits for it";
  FillState(68);  // a later layer, or step
  const std::optional<AuditSample> sample = audit->End();
  ASSERT_TRUE(sample.has_value());
  EXPECT_EQ(sample->request.layer(), 0u);
  EXPECT_EQ(sample->request.slot().arena_id(), 7u);
  EXPECT_EQ(sample->request.slot().bytes(), Layout().bytes);
  EXPECT_EQ(In<uint32_t>(*sample, Layout().cut, 1)[0], 52u);
  EXPECT_THAT(In<float>(*sample, Layout().lse, 4), ElementsAre(104, 105, 106, 107));
  EXPECT_THAT(In<uint32_t>(*sample, Layout().counts, 2), ElementsAre(2, 3));
  for (uint32_t q = 0; q < 4; ++q) {
    EXPECT_EQ(In<float>(*sample, Layout().queries, 4 * kDim)[q * kDim + 3],
              static_cast<float>((4 + q) * 2 * kDim + 3));
  }
  const uint32_t choices = Layout().choices;
  ASSERT_EQ(choices, layout_.max_clusters) << "fewer than the budget";
  ASSERT_LT(choices, kBudget);
  for (uint32_t head = 0; head < 2; ++head) {
    const uint32_t last = head * choices + choices - 1;
    EXPECT_EQ(In<uint32_t>(*sample, Layout().clusters, 2 * choices)[last],
              1000 * (head + 1) + choices - 1);
    EXPECT_EQ(In<uint32_t>(*sample, Layout().takes, 2 * choices)[last],
              5000 * (head + 1) + choices - 1);
  }
  EXPECT_FALSE(audit->End().has_value()) << "it is taken once";
}

TEST_F(StepAuditTest, TheCallersLogSumExpsAreUsedWhereItWantsThem) {
  const auto audit = Audit(1);
  audit->Begin();
  std::vector<float> lse(16);
  std::iota(lse.begin(), lse.end(), 0.0f);
  const gpu::AttentionTarget target = audit->WithLse({.lse = lse.data(), .lse_batch_stride = 8});
  EXPECT_EQ(target.lse, lse.data());
  ASSERT_TRUE(audit->Take(stream_, slot(), queries(), target).ok());
  const auto sample = audit->End();
  ASSERT_TRUE(sample.has_value());
  EXPECT_THAT(In<float>(*sample, Layout().lse, 4), ElementsAre(0, 1, 2, 3));
}

TEST_F(StepAuditTest, AFullRingDropsTheSample) {
  const auto audit = Audit(1);
  audit->Begin();
  const auto held = AuditRing::Take(ring_, Layout().bytes);
  ASSERT_TRUE(audit->Take(stream_, slot(), queries(), audit->WithLse({})).ok());
  EXPECT_EQ(stream_.copies, 0u);
  EXPECT_FALSE(audit->End().has_value());
}

TEST_F(StepAuditTest, ALayerThatIsAttendedAgainIsTakenAgain) {
  const auto audit = Audit(1);
  audit->Begin();
  const gpu::AttentionTarget target = audit->WithLse({});
  stream_.failure = absl::InternalError("the stream has failed");
  EXPECT_FALSE(audit->Take(stream_, slot(), queries(), target).ok());
  stream_.failure = absl::OkStatus();
  FillState(36);
  ASSERT_TRUE(audit->Take(stream_, slot(), queries(), target).ok());
  {
    const auto sample = audit->End();
    ASSERT_TRUE(sample.has_value());
    EXPECT_EQ(In<uint32_t>(*sample, Layout().cut, 1)[0], 36u);
  }
  EXPECT_TRUE(AuditRing::Take(ring_, Layout().bytes).has_value()) << "a sample that is dropped";
}

}  // namespace
}  // namespace clusterkv::client
