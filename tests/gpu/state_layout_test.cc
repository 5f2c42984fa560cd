#include "gpu/state_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "gpu/segment_plan.h"

namespace clusterkv::gpu {
namespace {

Shape SmallShape() {
  return {.layers = 3, .kv_heads = 2, .q_heads = 8, .head_dim = 96, .dtype = DType::kBf16};
}

MethodOptions SmallMethod() {
  MethodOptions method;
  method.sink_tokens = 5;
  method.min_window_tokens = 7;
  method.decode_segment_tokens = 32;
  method.tokens_per_cluster = 4;
  method.budget_tokens = 40;
  return method;
}

struct Array {
  uint64_t offset, bytes;
};

// Sizes as the header's comments give them.
std::vector<Array> Arrays(const StateLayout& l) {
  const uint64_t heads = l.kv_heads;
  const uint64_t all = heads * l.layers;
  const uint64_t mean = l.head_dim * SizeOf(l.dtype);
  return {{l.header, sizeof(StateHeader)},
          {l.published_segments, 4},
          {l.latch, sizeof(StepLatch)},
          {l.counters, l.layers * sizeof(LayerCounters)},
          {l.segment_ends, uint64_t{4} * l.max_segments},
          {l.segment_runs, all * l.max_segments * sizeof(SegmentRun)},
          {l.clusters, all * l.max_clusters * sizeof(ClusterEntry)},
          {l.centroids, all * l.max_clusters * mean},
          {l.value_means, all * l.max_clusters * mean},
          {l.sinks, all * l.sink_tokens * 2 * mean},
          {l.window, all * l.window_slots * 2 * mean},
          {l.cache, all * l.cache_tokens * 2 * mean},
          {l.slot_of_row, all * l.max_rows * 4},
          {l.last_used, all * l.max_clusters * 4},
          {l.mean_scores, all * l.max_clusters * 4},
          {l.free_slots, all * l.cache_tokens * 4},
          {l.free_count, all * 4},
          {l.selected_count, heads * 4},
          {l.selected_cluster, heads * l.budget_tokens * 4},
          {l.selected_take, heads * l.budget_tokens * 4},
          {l.slot_count, heads * 4},
          {l.slot_table, heads * l.budget_tokens * 4}};
}

TEST(StateLayout, ArraysAreAlignedAndDoNotOverlap) {
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (uint32_t max_tokens : {1u, 5u, 6u, 1000u, 131'072u}) {
      Shape shape = SmallShape();
      shape.dtype = dtype;
      const auto layout = StateLayout::Create(shape, SmallMethod().Resolved(shape), max_tokens);
      ASSERT_TRUE(layout.ok()) << layout.status();
      uint64_t end = 0;
      for (const Array& array : Arrays(*layout)) {
        EXPECT_EQ(array.offset % 256, 0u);
        EXPECT_GE(array.offset, end);
        EXPECT_LT(array.offset - end, 256u) << "a hole";
        end = array.offset + array.bytes;
      }
      EXPECT_GE(layout->total_bytes, end);
      EXPECT_LT(layout->total_bytes - end, 256u);
    }
  }
}

TEST(StateLayout, PublishedSegmentsIsAloneInItsLine) {
  const auto layout = StateLayout::Create(SmallShape(), SmallMethod().Resolved(SmallShape()), 100);
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_GE(layout->latch - layout->published_segments, 256u);
}

TEST(StateLayout, DimensionsFollowTheMethod) {
  MethodOptions method = SmallMethod();
  method.estimate = true;
  method.group = GroupRule::kMax;
  method.window_lag_segments = 2;
  const auto layout = StateLayout::Create(SmallShape(), method.Resolved(SmallShape()), 1000);
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(layout->window_slots, 7u + 32u * 3u);
  EXPECT_EQ(layout->max_rows, 995u);
  EXPECT_EQ(layout->max_segments, MaxSegments(method, 1000));
  EXPECT_EQ(layout->max_clusters, MaxClusters(method, 1000));
  EXPECT_EQ(layout->cache_tokens, 4u * 40u + 16u);
  EXPECT_EQ(layout->group_size, 4u);
  EXPECT_EQ(layout->estimate, 1u);
  EXPECT_EQ(layout->group, GroupRule::kMax);
}

TEST(StateLayout, EqualArgumentsGiveEqualLayouts) {
  const MethodOptions method = SmallMethod().Resolved(SmallShape());
  const StateLayout a = *StateLayout::Create(SmallShape(), method, 4096);
  const StateLayout b = *StateLayout::Create(SmallShape(), method, 4096);
  EXPECT_EQ(a.total_bytes, b.total_bytes);
  EXPECT_EQ(a.slot_table, b.slot_table);
}

TEST(StateLayout, MaxTokensIsBounded) {
  const MethodOptions method = SmallMethod().Resolved(SmallShape());
  for (uint32_t max_tokens : {0u, 16'777'217u, ~0u}) {
    const absl::Status status = StateLayout::Create(SmallShape(), method, max_tokens).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << max_tokens;
    EXPECT_NE(status.ToString().find("max_tokens"), std::string::npos) << status;
  }
  EXPECT_TRUE(StateLayout::Create(SmallShape(), method, 16'777'216).ok());
}

TEST(StateLayout, UnresolvedOptionsAreRefused) {
  MethodOptions method = SmallMethod();
  EXPECT_EQ(StateLayout::Create(SmallShape(), method, 100).status().code(),
            absl::StatusCode::kInvalidArgument);
  method.cache_tokens = 1000;  // the scale is still missing
  const absl::Status status = StateLayout::Create(SmallShape(), method, 100).status();
  EXPECT_NE(status.ToString().find("softmax_scale"), std::string::npos) << status;
}

TEST(StateLayout, SmallCacheIsRefused) {
  MethodOptions method = SmallMethod().Resolved(SmallShape());
  method.cache_tokens = 2 * 40 + 16 - 1;
  const absl::Status status = StateLayout::Create(SmallShape(), method, 100).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.ToString().find("cache_tokens"), std::string::npos) << status;
}

TEST(StateLayout, BlockBeyondTheLimitIsRefusedInsteadOfWrapping) {
  Shape shape = {
      .layers = 1024, .kv_heads = 1024, .q_heads = 16'384, .head_dim = 256, .dtype = DType::kFp32};
  MethodOptions method;
  method.tokens_per_cluster = 1;
  method.budget_tokens = 1'048'576;
  method.min_window_tokens = 65'536;
  const absl::Status status =
      StateLayout::Create(shape, method.Resolved(shape), 16'777'216).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.ToString().find("exceeds"), std::string::npos) << status;
}

}  // namespace
}  // namespace clusterkv::gpu
