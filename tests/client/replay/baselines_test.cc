#include "client/replay/baselines.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "client/replay/ranking.h"
#include "tests/client/replay/random_trace.h"
#include "tests/client/replay/reference_attention.h"

namespace clusterkv::client::replay {
namespace {

using ::testing::ElementsAre;
using ::testing::UnorderedElementsAreArray;

TEST(Ranking, BreaksTiesByLowerIndex) {
  std::vector<Ranked> items = {{1, 0}, {2, 1}, {2, 2}, {1, 3}, {3, 4}, {1, 5}};
  const std::vector<uint32_t> counts = {1, 2, 4};
  RankPrefixes(absl::MakeSpan(items), counts);
  const auto prefix = [&](size_t count) {
    std::vector<uint32_t> indices;
    for (size_t i = 0; i < count; ++i) indices.push_back(items[i].index);
    std::sort(indices.begin(), indices.end());
    return indices;
  };
  EXPECT_THAT(prefix(1), ElementsAre(4));
  EXPECT_THAT(prefix(2), ElementsAre(1, 4));
  EXPECT_THAT(prefix(4), ElementsAre(0, 1, 2, 4));
}

TEST(Ranking, TakesAllAndNone) {
  std::vector<Ranked> items = {{1, 0}, {2, 1}};
  RankPrefixes(absl::MakeSpan(items), std::vector<uint32_t>{0, 2, 2});
  RankPrefixes(absl::MakeSpan(items), std::vector<uint32_t>{});
  RankPrefixes({}, std::vector<uint32_t>{0});
  EXPECT_EQ(items.size(), 2u);
}

TEST(StepRanges, FollowTheSchedule) {
  gpu::MethodOptions method;
  method.sink_tokens = 4;
  method.min_window_tokens = 8;
  method.decode_segment_tokens = 16;
  const std::vector<StepRange> ranges = StepRanges(method, /*prompt_tokens=*/100, /*steps=*/40);
  EXPECT_EQ(ranges[0], (StepRange{4, 92, 100}));
  EXPECT_EQ(ranges[15].cut, 92u);   // 115 - 92 = 23
  EXPECT_EQ(ranges[16].cut, 108u);  // 116 - 92 = 24 = 8 + 16
  EXPECT_EQ(ranges[32].cut, 124u);
  EXPECT_EQ(ranges[39].window_tokens(), 139u + 1 - 124);
}

TEST(StepRanges, StartBelowTheSinks) {
  gpu::MethodOptions method;
  method.sink_tokens = 16;
  method.min_window_tokens = 4;
  method.decode_segment_tokens = 8;
  const std::vector<StepRange> ranges = StepRanges(method, /*prompt_tokens=*/10, /*steps=*/30);
  EXPECT_EQ(ranges[0].candidates(), 0u);
  EXPECT_EQ(ranges[0].sink_end(), 11u);
  EXPECT_EQ(ranges[0].window_tokens(), 0u);
  EXPECT_EQ(ranges[17].cut, 16u);  // position 27: 11 tokens
  EXPECT_EQ(ranges[18].cut, 24u);  // position 28: 12 = 4 + 8
}

TEST(ChooseWindow, TakesTheNewestFirst) {
  std::vector<uint32_t> positions;
  ChooseWindow({.sinks = 2, .cut = 10, .position = 12}, 3, positions);
  EXPECT_THAT(positions, ElementsAre(9, 8, 7));
  ChooseWindow({.sinks = 2, .cut = 10, .position = 12}, 0, positions);
  EXPECT_TRUE(positions.empty());
}

// Every step of every head of a trace whose last page is short most of the time.
class ChoicesTest : public testing::TestWithParam<gpu::DType> {
 protected:
  ChoicesTest() : trace_(MakeRandomTrace(directory_, {.dtype = GetParam(), .spread = 2.0f})) {
    method_.sink_tokens = 5;
    method_.min_window_tokens = 6;
    method_.decode_segment_tokens = 7;
    ranges_ = StepRanges(method_, trace_.prompt_tokens(), trace_.steps());
  }

  TemporaryDirectory directory_;
  Trace trace_;
  gpu::MethodOptions method_;
  std::vector<StepRange> ranges_;
};

TEST_P(ChoicesTest, QuestTakesTheReferencesPagesInOrder) {
  constexpr std::pair<gpu::GroupRule, const char*> kRules[] = {
      {gpu::GroupRule::kSoftmax, "softmax"},
      {gpu::GroupRule::kMean, "mean"},
      {gpu::GroupRule::kMax, "max"}};
  std::vector<float> queries;
  std::vector<uint32_t> positions;
  for (uint32_t head = 0; head < 2; ++head) {
    QuestPages pages(trace_, 1, head);
    for (uint32_t step = 0; step < trace_.steps(); ++step) {
      const ReferenceStep reference(trace_, 1, head, step, ranges_[step]);
      LoadQueries(trace_, 1, head, step, queries);
      pages.Score(ranges_[step], queries);
      for (const auto& [rule, name] : kRules) {
        for (const uint32_t count : {1u, 16u, 50u, 120u}) {
          pages.Choose(rule, count, positions);
          ASSERT_EQ(positions, reference.Quest(name, count)) << name << " at step " << step;
        }
      }
    }
  }
}

TEST_P(ChoicesTest, OracleTakesTheReferencesTokens) {
  StepAttention attention;
  OracleChooser oracle;
  std::vector<float> queries;
  std::vector<uint32_t> positions;
  const HeadRows rows(trace_, 0, 1);
  const std::vector<uint32_t> counts = {1, 10, 64, 100};
  for (uint32_t step = 0; step < trace_.steps(); ++step) {
    const ReferenceStep reference(trace_, 0, 1, step, ranges_[step]);
    LoadQueries(trace_, 0, 1, step, queries);
    attention.Compute(trace_, rows, queries, ranges_[step], counts);
    oracle.Choose(attention, positions);
    ASSERT_EQ(positions.size(), 100u);
    for (const uint32_t count : counts) {
      const std::vector<uint32_t> prefix(positions.begin(), positions.begin() + count);
      ASSERT_THAT(prefix, UnorderedElementsAreArray(reference.Oracle(count))) << "step " << step;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, ChoicesTest,
                         testing::Values(gpu::DType::kFp32, gpu::DType::kFp16, gpu::DType::kBf16),
                         [](const auto& info) { return gpu::DTypeName(info.param); });

}  // namespace
}  // namespace clusterkv::client::replay
