#include "client/ring_allocator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <thread>
#include <vector>

namespace clusterkv::client {
namespace {

Deadline Now() { return Deadline(absl::ZeroDuration()); }
Deadline Soon() { return Deadline(absl::Seconds(30)); }

TEST(RingAllocator, HandsOutAlignedRangesFromTheStart) {
  RingAllocator ring(1000);  // 960 usable
  EXPECT_EQ(ring.bytes(), 960u);
  EXPECT_EQ(*ring.Allocate(1, Now()), 0u);
  EXPECT_EQ(*ring.Allocate(65, Now()), 64u);
  EXPECT_EQ(*ring.Allocate(64, Now()), 192u);
  EXPECT_EQ(ring.free_bytes(), 960u - 256u);
}

TEST(RingAllocator, RefusesWhatCanNeverFit) {
  RingAllocator ring(1024);
  EXPECT_TRUE(absl::IsInvalidArgument(ring.Allocate(0, Now()).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ring.Allocate(1025, Now()).status()));
}

TEST(RingAllocator, IsExhaustedWithoutFreeRange) {
  RingAllocator ring(256);
  ASSERT_TRUE(ring.Allocate(256, Now()).ok());
  const absl::Status status = ring.Allocate(64, Now()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
}

TEST(RingAllocator, NeverWrapsARange) {
  RingAllocator ring(256);
  ASSERT_EQ(*ring.Allocate(64, Now()), 0u);
  ASSERT_EQ(*ring.Allocate(128, Now()), 64u);
  ASSERT_TRUE(ring.Release(0));
  // 64 bytes are free at either end: 128 would have to wrap.
  EXPECT_TRUE(absl::IsResourceExhausted(ring.Allocate(128, Now()).status()));
  EXPECT_EQ(*ring.Allocate(64, Now()), 0u);
}

TEST(RingAllocator, TakesCreditsInAnyOrderAndJoinsThem) {
  RingAllocator ring(256);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(ring.Allocate(64, Now()).ok());
  EXPECT_TRUE(ring.Release(128));
  EXPECT_TRUE(ring.Release(0));
  EXPECT_TRUE(ring.Release(192));
  EXPECT_TRUE(ring.Release(64));
  EXPECT_EQ(*ring.Allocate(256, Now()), 0u);
}

TEST(RingAllocator, IgnoresCreditOfWhatIsNotInUse) {
  RingAllocator ring(256);
  ASSERT_EQ(*ring.Allocate(128, Now()), 0u);
  EXPECT_FALSE(ring.Release(64));
  EXPECT_TRUE(ring.Release(0));
  EXPECT_FALSE(ring.Release(0));
  EXPECT_EQ(ring.free_bytes(), 256u);
}

TEST(RingAllocator, ShrinkGivesTheTailBack) {
  RingAllocator ring(256);
  ASSERT_EQ(*ring.Allocate(256, Now()), 0u);
  ring.Shrink(0, 65);
  EXPECT_EQ(ring.free_bytes(), 128u);
  EXPECT_EQ(*ring.Allocate(128, Now()), 128u);
  EXPECT_TRUE(ring.Release(0));
  EXPECT_EQ(ring.free_bytes(), 128u);
}

TEST(RingAllocator, WaitsForCredit) {
  RingAllocator ring(128);
  ASSERT_EQ(*ring.Allocate(128, Now()), 0u);
  std::thread daemon([&ring] { ring.Release(0); });
  const absl::StatusOr<uint64_t> offset = ring.Allocate(128, Soon());
  daemon.join();
  ASSERT_TRUE(offset.ok()) << offset.status();
  EXPECT_EQ(*offset, 0u);
}

TEST(RingAllocator, CloseEndsWaitsWithTheFirstReason) {
  RingAllocator ring(128);
  ASSERT_TRUE(ring.Allocate(128, Now()).ok());
  std::thread closer([&ring] {
    ring.Close(absl::UnavailableError("first"));
    ring.Close(absl::InternalError("second"));
  });
  const absl::Status status = ring.Allocate(64, Soon()).status();
  closer.join();
  EXPECT_EQ(status, absl::UnavailableError("first"));
  ring.Release(0);
  EXPECT_TRUE(absl::IsUnavailable(ring.Allocate(64, Now()).status()));
}

TEST(RingAllocator, RangesNeverOverlapInAnyHistory) {
  std::mt19937 random(11);
  constexpr uint64_t kBytes = 64 * 100;
  RingAllocator ring(kBytes);
  struct Range {
    uint64_t offset, bytes;
  };
  std::vector<Range> held;
  std::vector<bool> used(kBytes);
  for (int i = 0; i < 20'000; ++i) {
    if (random() % 2 == 0) {
      const uint64_t bytes = 1 + random() % 900;
      const absl::StatusOr<uint64_t> offset = ring.Allocate(bytes, Now());
      if (!offset.ok()) continue;
      ASSERT_LE(*offset + bytes, kBytes);
      for (uint64_t b = *offset; b < *offset + bytes; ++b) {
        ASSERT_FALSE(used[b]) << "seed 11, round " << i;
        used[b] = true;
      }
      held.push_back({*offset, bytes});
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      const Range range = held.back();
      held.pop_back();
      for (uint64_t b = range.offset; b < range.offset + range.bytes; ++b) used[b] = false;
      ASSERT_TRUE(ring.Release(range.offset));
    }
  }
  for (const Range& range : held) ASSERT_TRUE(ring.Release(range.offset));
  EXPECT_EQ(*ring.Allocate(kBytes, Now()), 0u);
}

}  // namespace
}  // namespace clusterkv::client
