#include "gpu/audit_layout.h"

#include <gtest/gtest.h>

#include "gpu/state_layout.h"

namespace clusterkv::gpu {
namespace {

AuditLayout LayoutOf(uint32_t budget_tokens, uint32_t max_tokens) {
  const Shape shape{.layers = 3, .kv_heads = 2, .q_heads = 10, .head_dim = 96};
  MethodOptions method;
  method.budget_tokens = budget_tokens;
  const auto state = StateLayout::Create(shape, method.Resolved(shape), max_tokens);
  EXPECT_TRUE(state.ok()) << state.status();
  return AuditLayout(*state);
}

// These numbers are the wire's: another version of a client computes them by itself.
TEST(AuditLayout, PartsFollowEachOtherOn64Bytes) {
  const AuditLayout layout = LayoutOf(20, 10'000);
  EXPECT_EQ(layout.q_heads, 10u);
  EXPECT_EQ(layout.choices, 20u);
  EXPECT_EQ(layout.query_bytes, 192u);
  EXPECT_EQ(layout.cut, 0u);
  EXPECT_EQ(layout.lse, 64u);         // 40 bytes
  EXPECT_EQ(layout.queries, 128u);    // 1920
  EXPECT_EQ(layout.counts, 2048u);    // 8
  EXPECT_EQ(layout.clusters, 2112u);  // 160
  EXPECT_EQ(layout.takes, 2304u);     // 160
  EXPECT_EQ(layout.bytes, 2496u);
}

TEST(AuditLayout, HasRoomForAllClustersWhereTheBudgetIsLarger) {
  const AuditLayout layout = LayoutOf(4096, 1000);
  EXPECT_LT(layout.choices, 4096u);
  EXPECT_EQ(layout.takes - layout.clusters, (2 * layout.choices * 4 + 63) / 64 * 64);
}

}  // namespace
}  // namespace clusterkv::gpu
