#include "client/bench/forced_misses.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

// A small context on the host backend, decoded by two sequences.
class ForcedMissesTest : public testing::Test {
 protected:
  static constexpr uint32_t kBatch = 2, kLayers = 2, kBudget = 128;

  void SetUp() override {
    auto backend = CreateBackend("host");
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
    ContextOptions options;
    options.shape = {
        .layers = kLayers, .kv_heads = 2, .q_heads = 4, .head_dim = 64, .dtype = gpu::DType::kBf16};
    options.method = gpu::MethodPreset("default")->Resolved(options.shape);
    options.method.budget_tokens = kBudget;
    options.method.cache_tokens = 0;
    options.tokens = 3000;
    options.store_bytes = 1 << 20;
    auto context = PublishedContext::Create(*backend_, options);
    ASSERT_TRUE(context.ok()) << context.status();
    context_ = *std::move(context);
    auto state = BatchState::Create(*backend_, *context_, kBudget, kBatch);
    ASSERT_TRUE(state.ok()) << state.status();
    state_ = *std::move(state);
  }

  absl::Status Step() {
    gpu::DecodeOps& ops = backend_->device().decode_ops();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      CKV_RETURN_IF_ERROR(ops.Select(backend_->stream(), state_->slots(kBatch), layer,
                                     state_->queries(layer), kBudget));
      CKV_RETURN_IF_ERROR(ops.Fetch(backend_->stream(), state_->slots(kBatch), layer));
    }
    return backend_->stream().Synchronize();
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<PublishedContext> context_;
  std::unique_ptr<BatchState> state_;
};

TEST_F(ForcedMissesTest, MissTheWantedShareInEveryStep) {
  ASSERT_TRUE(state_->Begin(kBatch).ok());
  ASSERT_TRUE(state_->Begin(kBatch).ok());
  const auto selections = state_->SelectAll(kBatch);
  ASSERT_TRUE(selections.ok()) << selections.status();
  ASSERT_TRUE(Step().ok());
  size_t selected = 0;
  for (const auto& list : *selections) selected += list.size();
  EXPECT_NE((*selections)[0], (*selections)[2]) << "layers ask for different topics";
  EXPECT_NE((*selections)[0], (*selections)[4]) << "sequences ask for different topics";
  for (const uint32_t percent : {0u, 10u, 50u, 100u}) {
    const auto editor = backend_->MakeEditor(ForceMisses(*state_, kBatch, *selections, percent, 7));
    ASSERT_TRUE(editor.ok()) << editor.status();
    for (int run = 0; run < 3; ++run) {
      ASSERT_TRUE(state_->Begin(kBatch).ok());
      ASSERT_TRUE(backend_->stream().Synchronize().ok());
      ASSERT_TRUE((*editor)->Apply().ok());
      const auto before = state_->ReadCounters(kBatch);
      ASSERT_TRUE(Step().ok());
      const auto after = state_->ReadCounters(kBatch);
      EXPECT_EQ(after->missed_clusters - before->missed_clusters, (selected * percent + 50) / 100);
      EXPECT_EQ(after->hit_clusters + after->missed_clusters - before->hit_clusters -
                    before->missed_clusters,
                selected);
    }
  }
}

TEST_F(ForcedMissesTest, KeepTheCacheFull) {
  ASSERT_TRUE(state_->Begin(kBatch).ok());
  ASSERT_TRUE(state_->Begin(kBatch).ok());
  const auto selections = state_->SelectAll(kBatch);
  ASSERT_TRUE(selections.ok()) << selections.status();
  ASSERT_TRUE(Step().ok());
  const auto editor = backend_->MakeEditor(ForceMisses(*state_, kBatch, *selections, 20, 7));
  ASSERT_TRUE(editor.ok()) << editor.status();
  ASSERT_TRUE((*editor)->Apply().ok());
  const gpu::StateLayout& layout = state_->layout();
  for (const gpu::BatchSlot& slot : state_->slots(kBatch)) {
    const auto* const free = gpu::At<uint32_t>(slot.state, layout.free_count);
    for (size_t head = 0; head < layout.head_index(layout.layers, 0); ++head) {
      EXPECT_LT(free[head], 64u);
    }
  }
  ASSERT_TRUE(state_->Begin(kBatch).ok());
  EXPECT_TRUE(Step().ok());
}

TEST_F(ForcedMissesTest, RewindBeginsEveryStepAtTheSameLength) {
  for (int step = 0; step < 400; ++step) ASSERT_TRUE(state_->Begin(kBatch).ok());
  ASSERT_TRUE(backend_->stream().Synchronize().ok());
  const auto& latch =
      *gpu::At<gpu::StepLatch>(state_->slots(kBatch)[0].state, state_->layout().latch);
  EXPECT_EQ(latch.length, 3001u);
  EXPECT_EQ(latch.cut, context_->cut());
  EXPECT_EQ(latch.step, 400u);
  EXPECT_EQ(latch.errors, 0u);
}

}  // namespace
}  // namespace clusterkv::client::bench
