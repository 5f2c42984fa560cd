#include "client/ring_layout.h"

#include <gtest/gtest.h>

#include "gpu/segment_plan.h"

namespace clusterkv::client {
namespace {

gpu::Shape TestShape() {
  return {.layers = 6, .kv_heads = 2, .q_heads = 4, .head_dim = 64, .dtype = gpu::DType::kFp16};
}
constexpr uint64_t kTokenBytes = 2 * 2 * 64 * 2;  // K and V of one layer

TEST(RangeLayout, FollowsTheWireOrder) {
  const RangeLayout layout(TestShape(), 3, 10);
  EXPECT_EQ(layout.row_bytes(), 128u);
  EXPECT_EQ(layout.token_bytes(), 256u);
  EXPECT_EQ(layout.k_offset(0), 0u);
  EXPECT_EQ(layout.v_offset(0), 2560u);
  EXPECT_EQ(layout.k_offset(2), 4 * 2560u);
  EXPECT_EQ(layout.bytes(), 6 * 2560u);
}

// Every (layer, token) exactly once, in order within its layer, none above the limit.
void CheckPieces(const IngestRange& range, uint64_t piece_bytes, size_t expected,
                 const gpu::MethodOptions& method = {}) {
  const auto pieces = SplitRange(range, TestShape(), method, piece_bytes);
  EXPECT_EQ(pieces.size(), expected);
  std::vector<uint32_t> next(TestShape().layers, range.position);
  std::vector<bool> ended(TestShape().layers);
  for (const IngestRange& piece : pieces) {
    EXPECT_GT(piece.count, 0u);
    const uint64_t bytes = RangeLayout(TestShape(), piece.layer_count, piece.count).bytes();
    EXPECT_TRUE(bytes <= piece_bytes || bytes == kTokenBytes) << bytes;
    const auto kind = range.end_of_prompt ? gpu::RangeKind::kPromptEnd : gpu::RangeKind::kPrompt;
    EXPECT_LE(
        piece.layer_count * TestShape().kv_heads * gpu::SegmentsOfRange(method, kind, piece.count),
        gpu::kMaxSegmentsOfRange);
    for (uint32_t i = 0; i < piece.layer_count; ++i) {
      const uint32_t layer = piece.layer_begin + i;
      EXPECT_EQ(piece.position, next[layer]);
      next[layer] += piece.count;
      EXPECT_FALSE(ended[layer]);
      ended[layer] = piece.end_of_prompt;
    }
  }
  for (uint32_t layer = 0; layer < TestShape().layers; ++layer) {
    const bool inside = layer >= range.layer_begin && layer < range.layer_begin + range.layer_count;
    EXPECT_EQ(next[layer], range.position + (inside ? range.count : 0));
    EXPECT_EQ(ended[layer], inside && range.end_of_prompt);
  }
}

TEST(SplitRange, KeepsARangeThatFits) {
  CheckPieces({.position = 5, .count = 10, .layer_begin = 1, .layer_count = 4}, 40 * kTokenBytes,
              1);
}

TEST(SplitRange, CutsBetweenLayersWhereOneFits) {
  CheckPieces(
      {.position = 0, .count = 10, .layer_begin = 0, .layer_count = 6, .end_of_prompt = true},
      45 * kTokenBytes, 2);
}

TEST(SplitRange, CutsOneLayerWhereItDoesNotFit) {
  CheckPieces(
      {.position = 3, .count = 10, .layer_begin = 2, .layer_count = 2, .end_of_prompt = true},
      4 * kTokenBytes, 6);
}

TEST(SplitRange, BeginsOnlySoManySegmentsInAPiece) {
  constexpr uint64_t kPlenty = 1ull << 40;
  gpu::MethodOptions method;
  method.prompt_segment_tokens = 1;  // 32,768 segments of 2 heads may begin
  IngestRange range{.position = 7, .count = 10'000, .layer_begin = 0, .layer_count = 6};
  CheckPieces(range, kPlenty, 2, method);
  range.count = 32'768;
  CheckPieces(range, kPlenty, 6, method);
  range.count = 32'769;
  CheckPieces(range, kPlenty, 12, method);
  method.prompt_segment_tokens = 32'769;
  CheckPieces(range, kPlenty, 1, method);
  // The window's own at the end of the prompt.
  method.min_window_tokens = 16'000;
  method.decode_segment_tokens = 1;
  range.end_of_prompt = true;
  CheckPieces(range, kPlenty, 3, method);
}

TEST(SplitRange, GoesDownToOneToken) {
  CheckPieces({.position = 0, .count = 3, .layer_begin = 0, .layer_count = 2}, 1, 6);
}

}  // namespace
}  // namespace clusterkv::client
