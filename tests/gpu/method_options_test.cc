#include "gpu/method_options.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace clusterkv::gpu {
namespace {

Shape SmallShape() {
  return {.layers = 2, .kv_heads = 2, .q_heads = 4, .head_dim = 64, .dtype = DType::kFp16};
}

void ExpectRefused(const MethodOptions& method, const std::string& field) {
  const absl::Status status = method.Validate();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
  // The field comes first, so that a caller can put its own path in front.
  EXPECT_EQ(std::string(status.message()).rfind(field + " is ", 0), 0u) << status;
  EXPECT_NE(status.ToString().find("allowed:"), std::string::npos) << status;
}

TEST(MethodOptions, GroupRulesParseBackToThemselves) {
  for (GroupRule rule : {GroupRule::kSoftmax, GroupRule::kMean, GroupRule::kMax}) {
    const auto parsed = ParseGroupRule(GroupRuleName(rule));
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(*parsed, rule);
  }
  EXPECT_EQ(ParseGroupRule("median").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(MethodOptions, EveryPresetIsValidAndResolves) {
  for (const std::string& name : MethodPresetNames()) {
    const auto method = MethodPreset(name);
    ASSERT_TRUE(method.ok()) << method.status();
    EXPECT_TRUE(method->Validate().ok()) << name;
    const MethodOptions resolved = method->Resolved(SmallShape());
    EXPECT_TRUE(resolved.Validate().ok()) << name << ": " << resolved.Validate();
    EXPECT_FLOAT_EQ(resolved.softmax_scale, 0.125f);
    EXPECT_EQ(resolved.cache_tokens,
              4 * resolved.budget_tokens + resolved.largest_cluster_tokens());
  }
}

TEST(MethodOptions, PaperPresetIsThePapers) {
  const MethodOptions paper = *MethodPreset("paper");
  EXPECT_EQ(paper.tokens_per_cluster, 80u);
  EXPECT_EQ(paper.sink_tokens, 16u);
  EXPECT_EQ(paper.min_window_tokens, 0u);
  EXPECT_EQ(paper.decode_segment_tokens, 320u);
  EXPECT_FALSE(paper.center_keys);
  EXPECT_FALSE(paper.estimate);
}

TEST(MethodOptions, UnknownPresetListsThePresets) {
  const absl::Status status = MethodPreset("papr").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.ToString().find("default, paper"), std::string::npos) << status;
}

TEST(MethodOptions, ResolvedKeepsWhatIsGiven) {
  MethodOptions method;
  method.cache_tokens = 12'345;
  method.softmax_scale = 0.5f;
  const MethodOptions resolved = method.Resolved(SmallShape());
  EXPECT_EQ(resolved.cache_tokens, 12'345u);
  EXPECT_EQ(resolved.softmax_scale, 0.5f);
}

TEST(MethodOptions, ResolvedDoesNotWrapOnInvalidOptions) {
  MethodOptions method;
  method.budget_tokens = std::numeric_limits<uint32_t>::max();
  EXPECT_EQ(method.Resolved(SmallShape()).cache_tokens, std::numeric_limits<uint32_t>::max());
  ExpectRefused(method.Resolved(SmallShape()), "budget_tokens");
}

TEST(MethodOptions, EachFieldIsBoundedOnBothSides) {
  struct Range {
    const char* field;
    uint32_t MethodOptions::*member;
    uint32_t least, most;
  };
  const Range ranges[] = {
      {"sink_tokens", &MethodOptions::sink_tokens, 0, 1024},
      {"min_window_tokens", &MethodOptions::min_window_tokens, 0, 65'536},
      {"decode_segment_tokens", &MethodOptions::decode_segment_tokens, 1, 65'536},
      {"prompt_segment_tokens", &MethodOptions::prompt_segment_tokens, 1, 65'536},
      {"tokens_per_cluster", &MethodOptions::tokens_per_cluster, 1, 4096},
      {"kmeans_iterations", &MethodOptions::kmeans_iterations, 1, 1000},
      {"window_lag_segments", &MethodOptions::window_lag_segments, 0, 64},
      {"budget_tokens", &MethodOptions::budget_tokens, 1, 1'048'576},
  };
  for (const Range& range : ranges) {
    MethodOptions method;
    method.*range.member = range.least;
    EXPECT_TRUE(method.Validate().ok()) << method.Validate();
    method.*range.member = range.most;
    EXPECT_TRUE(method.Validate().ok()) << method.Validate();
    method.*range.member = range.most + 1;
    ExpectRefused(method, range.field);
    method.*range.member = std::numeric_limits<uint32_t>::max();
    ExpectRefused(method, range.field);
    if (range.least > 0) {
      method.*range.member = range.least - 1;
      ExpectRefused(method, range.field);
    }
  }
}

TEST(MethodOptions, CacheHoldsTwoBudgetsAndTheLargestCluster) {
  MethodOptions method;
  method.budget_tokens = 1000;
  method.tokens_per_cluster = 10;
  method.cache_tokens = 2040;
  EXPECT_TRUE(method.Validate().ok()) << method.Validate();
  method.cache_tokens = 2039;
  ExpectRefused(method, "cache_tokens");
  EXPECT_NE(method.Validate().ToString().find("2040"), std::string::npos);
}

TEST(MethodOptions, ScaleIsFiniteAndNotNegative) {
  MethodOptions method;
  for (float scale : {-1.0f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    method.softmax_scale = scale;
    ExpectRefused(method, "softmax_scale");
  }
}

TEST(MethodOptions, UnknownGroupRuleIsRefused) {
  MethodOptions method;
  method.group = static_cast<GroupRule>(0);
  ExpectRefused(method, "group");
}

}  // namespace
}  // namespace clusterkv::gpu
