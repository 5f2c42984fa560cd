#include "service/extent_allocator.h"

#include <gtest/gtest.h>

#include <random>
#include <utility>
#include <vector>

#include "tests/gpu/seed.h"

namespace clusterkv::service {
namespace {

constexpr uint64_t kUnit = ExtentAllocator::kAlignment;

TEST(ExtentAllocator, RoundsUpToItsAlignment) {
  EXPECT_EQ(ExtentAllocator::RoundUp(0), 0u);
  EXPECT_EQ(ExtentAllocator::RoundUp(1), kUnit);
  EXPECT_EQ(ExtentAllocator::RoundUp(kUnit), kUnit);
  EXPECT_EQ(ExtentAllocator::RoundUp(kUnit + 1), 2 * kUnit);
}

TEST(ExtentAllocator, HasNothingWithoutChunks) {
  ExtentAllocator allocator;
  EXPECT_FALSE(allocator.Allocate(1).has_value());
}

TEST(ExtentAllocator, FillsAChunkFromItsStart) {
  ExtentAllocator allocator;
  allocator.AddChunk(7, 4 * kUnit);
  EXPECT_TRUE(allocator.chunk_empty(7));
  const auto first = allocator.Allocate(1);
  const auto second = allocator.Allocate(3 * kUnit);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first->chunk, 7u);
  EXPECT_EQ(first->offset, 0u);
  EXPECT_EQ(first->bytes, kUnit);
  EXPECT_EQ(second->offset, kUnit);
  EXPECT_FALSE(allocator.Allocate(1).has_value());
  EXPECT_FALSE(allocator.chunk_empty(7));
}

TEST(ExtentAllocator, TakesTheLowestChunkWithRoom) {
  ExtentAllocator allocator;
  allocator.AddChunk(1, 2 * kUnit);
  allocator.AddChunk(0, kUnit);
  EXPECT_EQ(allocator.Allocate(2 * kUnit)->chunk, 1u);
  EXPECT_EQ(allocator.Allocate(kUnit)->chunk, 0u);
  EXPECT_FALSE(allocator.Allocate(kUnit).has_value());
}

TEST(ExtentAllocator, JoinsAFreedExtentWithBothNeighbours) {
  ExtentAllocator allocator;
  allocator.AddChunk(0, 3 * kUnit);
  const Extent a = *allocator.Allocate(kUnit);
  const Extent b = *allocator.Allocate(kUnit);
  const Extent c = *allocator.Allocate(kUnit);
  allocator.Free(a);
  allocator.Free(c);
  EXPECT_FALSE(allocator.Allocate(2 * kUnit).has_value());
  allocator.Free(b);
  EXPECT_TRUE(allocator.chunk_empty(0));
  EXPECT_EQ(allocator.Allocate(3 * kUnit)->offset, 0u);
}

TEST(ExtentAllocator, ShrinkGivesBackTheEnd) {
  ExtentAllocator allocator;
  allocator.AddChunk(0, 4 * kUnit);
  Extent extent = *allocator.Allocate(4 * kUnit);
  allocator.Shrink(extent, kUnit + 1);
  EXPECT_EQ(extent.bytes, 2 * kUnit);
  EXPECT_EQ(allocator.Allocate(2 * kUnit)->offset, 2 * kUnit);
  allocator.Shrink(extent, 4 * kUnit);  // never grows
  EXPECT_EQ(extent.bytes, 2 * kUnit);
  allocator.Shrink(extent, 0);
  EXPECT_EQ(extent.bytes, 0u);
  EXPECT_EQ(allocator.Allocate(2 * kUnit)->offset, 0u);
  allocator.Free(extent);  // of nothing
}

TEST(ExtentAllocator, TellsWhatIsUsedAndTheLargestHole) {
  ExtentAllocator allocator;
  EXPECT_EQ(allocator.used_bytes(), 0u);
  EXPECT_EQ(allocator.largest_hole(), 0u);
  allocator.AddChunk(0, 4096);
  allocator.AddChunk(1, 2048);
  EXPECT_EQ(allocator.largest_hole(), 4096u);
  const auto first = allocator.Allocate(1024);
  ASSERT_TRUE(allocator.Allocate(2048).has_value());
  EXPECT_EQ(allocator.used_bytes(), 3072u);
  EXPECT_EQ(allocator.largest_hole(), 2048u) << "the second chunk";
  ASSERT_TRUE(allocator.Allocate(2048).has_value());
  EXPECT_EQ(allocator.largest_hole(), 1024u) << "the end of the first";
  allocator.Free(*first);
  EXPECT_EQ(allocator.used_bytes(), 4096u);
  EXPECT_EQ(allocator.largest_hole(), 1024u);
}

TEST(ExtentAllocator, ARemovedChunkIsNoLongerUsed) {
  ExtentAllocator allocator;
  allocator.AddChunk(0, kUnit);
  allocator.AddChunk(1, kUnit);
  allocator.RemoveChunk(0);
  EXPECT_EQ(allocator.Allocate(kUnit)->chunk, 1u);
  EXPECT_FALSE(allocator.Allocate(kUnit).has_value());
}

// What is taken, one flag for each unit of each chunk.
class UnitMap {
 public:
  UnitMap(size_t chunks, size_t units) : taken_(chunks, std::vector<bool>(units)) {}

  // False if some unit is in the other state already.
  bool Set(const Extent& extent, bool taken) {
    for (uint64_t i = extent.offset / kUnit; i < (extent.offset + extent.bytes) / kUnit; ++i) {
      if (i >= taken_[extent.chunk].size() || taken_[extent.chunk][i] == taken) return false;
      taken_[extent.chunk][i] = taken;
    }
    return true;
  }
  bool HasHole(uint64_t units) const {
    for (const auto& chunk : taken_) {
      uint64_t run = 0;
      for (const bool taken : chunk) {
        run = taken ? 0 : run + 1;
        if (run >= units) return true;
      }
    }
    return false;
  }
  bool empty(uint32_t chunk) const {
    for (const bool taken : taken_[chunk]) {
      if (taken) return false;
    }
    return true;
  }

 private:
  std::vector<std::vector<bool>> taken_;
};

TEST(ExtentAllocator, RandomHistoriesAgreeWithAMapOfUnits) {
  constexpr uint32_t kChunks = 3, kUnits = 24;
  const uint64_t seed = gpu::TestSeed();
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t bound) { return random() % bound; };

  ExtentAllocator allocator;
  UnitMap model(kChunks, kUnits);
  for (uint32_t chunk = 0; chunk < kChunks; ++chunk) allocator.AddChunk(chunk, kUnits * kUnit);
  std::vector<Extent> live;
  for (int step = 0; step < 20'000; ++step) {
    const uint64_t action = below(8);
    if (action < 4) {
      const uint64_t bytes = 1 + below(8 * kUnit);
      const uint64_t units = ExtentAllocator::RoundUp(bytes) / kUnit;
      const auto extent = allocator.Allocate(bytes);
      ASSERT_EQ(extent.has_value(), model.HasHole(units)) << "step " << step;
      if (!extent) continue;
      ASSERT_EQ(extent->bytes, units * kUnit);
      ASSERT_TRUE(model.Set(*extent, true)) << "step " << step;
      live.push_back(*extent);
    } else if (!live.empty()) {
      std::swap(live[below(live.size())], live.back());
      if (action == 7) {
        const Extent before = live.back();
        const uint64_t bytes = 1 + below(before.bytes);
        allocator.Shrink(live.back(), bytes);
        const uint64_t kept = ExtentAllocator::RoundUp(bytes);
        ASSERT_EQ(live.back().bytes, kept);
        ASSERT_TRUE(model.Set({before.chunk, before.offset + kept, before.bytes - kept}, false));
      } else {
        allocator.Free(live.back());
        ASSERT_TRUE(model.Set(live.back(), false));
        live.pop_back();
      }
    }
    for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {
      ASSERT_EQ(allocator.chunk_empty(chunk), model.empty(chunk)) << "step " << step;
    }
  }
}

}  // namespace
}  // namespace clusterkv::service
