#include "gpu/segment_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <random>

#include "tests/gpu/seed.h"

namespace clusterkv::gpu {
namespace {

MethodOptions SmallMethod() {
  MethodOptions method;
  method.sink_tokens = 4;
  method.min_window_tokens = 3;
  method.decode_segment_tokens = 5;
  method.prompt_segment_tokens = 10;
  method.tokens_per_cluster = 2;
  return method;
}

MethodOptions RandomMethod(std::mt19937_64& random) {
  const auto upto = [&](uint32_t most) { return static_cast<uint32_t>(random() % (most + 1)); };
  MethodOptions method;
  method.sink_tokens = upto(20);
  method.min_window_tokens = upto(30);
  method.decode_segment_tokens = 1 + upto(40);
  method.prompt_segment_tokens = 1 + upto(100);
  method.tokens_per_cluster = 1 + upto(20);
  return method;
}

TEST(SegmentPlan, FullPromptSegmentWaitsForTheWindowBehindIt) {
  const SegmentPlan plan(SmallMethod());
  EXPECT_EQ(plan.cut(), 4u);
  EXPECT_EQ(plan.Next(16, std::nullopt), std::nullopt);
  EXPECT_EQ(plan.Next(17, std::nullopt), (Segment{4, 14}));
}

TEST(SegmentPlan, TailIsShorterAndLeavesTheWindow) {
  SegmentPlan plan(SmallMethod());
  plan.Advance({4, 14});
  EXPECT_EQ(plan.Next(20, std::nullopt), std::nullopt);
  EXPECT_EQ(plan.Next(19, 20), std::nullopt);
  EXPECT_EQ(plan.Next(20, 20), (Segment{14, 17}));
}

TEST(SegmentPlan, DecodeSegmentsFollowOnceTheWindowIsFull) {
  SegmentPlan plan(SmallMethod());
  plan.Advance({4, 14});
  plan.Advance({14, 17});
  EXPECT_EQ(plan.Next(24, 20), std::nullopt);
  EXPECT_EQ(plan.Next(25, 20), (Segment{17, 22}));
  plan.Advance({17, 22});
  EXPECT_EQ(plan.Next(29, 20), std::nullopt);
  EXPECT_EQ(plan.Next(30, 20), (Segment{22, 27}));
}

TEST(SegmentPlan, PromptWithinTheSinksLeavesAllToDecoding) {
  const SegmentPlan plan(SmallMethod());
  for (uint32_t prompt : {0u, 1u, 4u, 7u}) {
    EXPECT_EQ(plan.Next(11, prompt), std::nullopt) << prompt;
    EXPECT_EQ(plan.Next(12, prompt), (Segment{4, 9})) << prompt;
  }
}

TEST(SegmentPlan, AllSegmentsAreAdjacentAndKeepTheWindow) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 2000; ++round) {
    const MethodOptions method = RandomMethod(random);
    const auto prompt = static_cast<uint32_t>(random() % 500);
    const auto length = prompt + static_cast<uint32_t>(random() % 300);
    uint32_t cut = method.sink_tokens;
    for (const Segment& segment : AllSegments(method, prompt, length)) {
      ASSERT_EQ(segment.begin, cut);
      ASSERT_GT(segment.end, segment.begin);
      ASSERT_LE(segment.end + method.min_window_tokens, length);
      cut = segment.end;
    }
    // No more than one decode segment waits: the window ring of any lag holds the rest.
    if (length > cut) {
      ASSERT_LT(length - cut, method.min_window_tokens + method.decode_segment_tokens);
    }
  }
}

TEST(SegmentPlan, SegmentsDoNotDependOnWhenTheLengthIsKnown) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 500; ++round) {
    const MethodOptions method = RandomMethod(random);
    const auto prompt = static_cast<uint32_t>(random() % 500);
    const auto length = prompt + static_cast<uint32_t>(random() % 100);
    std::vector<Segment> found;
    SegmentPlan plan(method);
    uint32_t arrived = 0;
    while (arrived < length) {
      arrived = std::min<uint32_t>(length, arrived + 1 + static_cast<uint32_t>(random() % 40));
      if (arrived < prompt) {
        while (const auto next = plan.Next(arrived, std::nullopt)) {
          found.push_back(*next);
          plan.Advance(*next);
        }
        continue;
      }
      while (const auto next = plan.Next(arrived, prompt)) {
        found.push_back(*next);
        plan.Advance(*next);
      }
    }
    ASSERT_EQ(found, AllSegments(method, prompt, length));
  }
}

TEST(SegmentPlan, CountIsThatOfThePlanWhateverIsKnownOfThePrompt) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 5000; ++round) {
    const MethodOptions method = RandomMethod(random);
    const auto length = static_cast<uint32_t>(random() % 800);
    std::optional<uint32_t> prompt;
    if (round % 3 != 0) prompt = static_cast<uint32_t>(random() % 800);
    SegmentPlan plan(method);
    uint32_t count = 0;
    while (const auto next = plan.Next(length, prompt)) {
      plan.Advance(*next);
      ++count;
    }
    ASSERT_EQ(SegmentCount(method, prompt, length), count)
        << "prompt " << (prompt ? static_cast<int>(*prompt) : -1) << " length " << length;
  }
}

TEST(SegmentPlan, BoundsHoldForAnyPromptAndAnySplit) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 2000; ++round) {
    const MethodOptions method = RandomMethod(random);
    const auto max_tokens = 1 + static_cast<uint32_t>(random() % 1000);
    const auto length = 1 + static_cast<uint32_t>(random() % max_tokens);
    const auto prompt = static_cast<uint32_t>(random() % (length + 1));
    const std::vector<Segment> segments = AllSegments(method, prompt, length);
    ASSERT_LE(segments.size(), MaxSegments(method, max_tokens));
    uint32_t clusters = 0;
    for (const Segment& segment : segments) {
      clusters += MaxClustersOfSegment(method, segment.tokens());
    }
    ASSERT_LE(clusters, MaxClusters(method, max_tokens));
  }
}

TEST(SegmentPlan, SegmentsOfARangeCountTheWindowsAtThePromptsEnd) {
  MethodOptions method = SmallMethod();  // prompt segments of 10, decode segments of 5
  method.min_window_tokens = 11;
  EXPECT_EQ(SegmentsOfRange(method, RangeKind::kPrompt, 1), 1u);
  EXPECT_EQ(SegmentsOfRange(method, RangeKind::kPrompt, 10), 1u);
  EXPECT_EQ(SegmentsOfRange(method, RangeKind::kPrompt, 11), 2u);
  EXPECT_EQ(SegmentsOfRange(method, RangeKind::kPromptEnd, 11), 2u + 3u);
  EXPECT_EQ(SegmentsOfRange(method, RangeKind::kDecoded, 11), 3u);
  EXPECT_EQ(SegmentsOfRange(method, RangeKind::kPrompt, ~0u), 429'496'730u);
}

TEST(SegmentPlan, ClustersOfSegmentRoundsUp) {
  MethodOptions method;
  method.tokens_per_cluster = 80;
  EXPECT_EQ(ClustersOfSegment(method, 1), 1u);
  EXPECT_EQ(ClustersOfSegment(method, 80), 1u);
  EXPECT_EQ(ClustersOfSegment(method, 81), 2u);
  EXPECT_EQ(ClustersOfSegment(method, 320), 4u);
}

TEST(SegmentPlan, SplitsOfLargeClustersFitTheBound) {
  MethodOptions method;
  method.tokens_per_cluster = 8;
  const uint32_t largest = method.largest_cluster_tokens();
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 2000; ++round) {
    const auto tokens = 1 + static_cast<uint32_t>(random() % 500);
    const uint32_t clusters = ClustersOfSegment(method, tokens);
    // Any division into at most `clusters` parts, skewed so that some parts are large.
    std::vector<uint32_t> sizes(clusters, 0);
    for (uint32_t i = 0; i < tokens; ++i) ++sizes[random() % (1 + random() % clusters)];
    uint32_t pieces = 0;
    for (uint32_t size : sizes) pieces += (size + largest - 1) / largest;
    ASSERT_LE(pieces, MaxClustersOfSegment(method, tokens));
  }
}

TEST(SegmentPlan, LargestSequenceDoesNotOverflow) {
  MethodOptions method;
  method.sink_tokens = 0;
  method.min_window_tokens = 0;
  method.decode_segment_tokens = 1;
  method.prompt_segment_tokens = 1;
  method.tokens_per_cluster = 1;
  EXPECT_EQ(MaxSegments(method, 16'777'216), 16'777'217u);
  EXPECT_EQ(SegmentCount(method, 16'777'216, 16'777'216), 16'777'216u);
  EXPECT_EQ(SegmentCount(method, std::nullopt, 16'777'216), 16'777'216u);
  EXPECT_EQ(MaxClusters(method, 16'777'216), 16'777'216u);
  EXPECT_EQ(SegmentPlan(method).Next(~0u, ~0u), (Segment{0, 1}));
}

}  // namespace
}  // namespace clusterkv::gpu
