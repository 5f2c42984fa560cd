#include "service/ring_ranges.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

#include "tests/gpu/seed.h"

namespace clusterkv::service {
namespace {

TEST(RingRanges, RefusesWhatTouchesARangeInUse) {
  RingRanges ranges;
  EXPECT_TRUE(ranges.Acquire(1, 100, 50));
  EXPECT_FALSE(ranges.Acquire(1, 100, 50));
  EXPECT_FALSE(ranges.Acquire(1, 149, 1));
  EXPECT_FALSE(ranges.Acquire(1, 0, 101));
  EXPECT_FALSE(ranges.Acquire(1, 0, 1000));
  EXPECT_FALSE(ranges.Acquire(1, 120, 5));
  EXPECT_EQ(ranges.size(), 1u);
}

TEST(RingRanges, TakesNeighboursAndOtherArenas) {
  RingRanges ranges;
  EXPECT_TRUE(ranges.Acquire(2, 100, 50));
  EXPECT_TRUE(ranges.Acquire(2, 150, 50));
  EXPECT_TRUE(ranges.Acquire(2, 50, 50));
  EXPECT_TRUE(ranges.Acquire(1, 100, 50));
  EXPECT_TRUE(ranges.Acquire(3, 0, std::numeric_limits<uint64_t>::max()));
  EXPECT_EQ(ranges.size(), 5u);
}

TEST(RingRanges, AReleasedRangeIsFreeAgain) {
  RingRanges ranges;
  EXPECT_TRUE(ranges.Acquire(1, 0, 64));
  ranges.Release(1, 0);
  EXPECT_EQ(ranges.size(), 0u);
  EXPECT_TRUE(ranges.Acquire(1, 32, 64));
}

TEST(RingRanges, KnowsHowMuchIsInUse) {
  RingRanges ranges;
  EXPECT_EQ(ranges.bytes(), 0u);
  EXPECT_TRUE(ranges.Acquire(1, 0, 100));
  EXPECT_TRUE(ranges.Acquire(2, 0, 30));
  EXPECT_FALSE(ranges.Acquire(1, 50, 100));
  EXPECT_EQ(ranges.bytes(), 130u);
  ranges.Release(1, 0);
  EXPECT_EQ(ranges.bytes(), 30u);
  ranges.Release(1, 0);  // once more changes nothing
  EXPECT_EQ(ranges.bytes(), 30u);
}

TEST(RingRanges, RandomHistoriesAgreeWithBruteForce) {
  struct Range {
    uint32_t arena;
    uint64_t offset, bytes;
  };
  const uint64_t seed = gpu::TestSeed();
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  RingRanges ranges;
  std::vector<Range> model;
  for (int step = 0; step < 20'000; ++step) {
    if (random() % 2 == 0 && !model.empty()) {
      const size_t victim = random() % model.size();
      ranges.Release(model[victim].arena, model[victim].offset);
      model.erase(model.begin() + static_cast<std::ptrdiff_t>(victim));
    } else {
      const Range range{static_cast<uint32_t>(1 + random() % 3), random() % 400, 1 + random() % 60};
      bool free = true;
      for (const Range& other : model) {
        free &= other.arena != range.arena || other.offset >= range.offset + range.bytes ||
                range.offset >= other.offset + other.bytes;
      }
      ASSERT_EQ(ranges.Acquire(range.arena, range.offset, range.bytes), free) << "step " << step;
      if (free) model.push_back(range);
    }
    ASSERT_EQ(ranges.size(), model.size());
  }
}

}  // namespace
}  // namespace clusterkv::service
