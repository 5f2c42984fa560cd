#include "client/audit_ring.h"

#include <gtest/gtest.h>

#include <cstring>

#include "tests/client/host_arena.h"

namespace clusterkv::client {
namespace {

TEST(AuditRing, SlotsDoNotOverlapAndComeBack) {
  const auto ring = std::make_shared<AuditRing>(HostArena(7, 256));
  EXPECT_EQ(ring->bytes(), 256u);
  {
    const auto first = AuditRing::Take(ring, 100);
    const auto second = AuditRing::Take(ring, 100);
    ASSERT_TRUE(first.has_value() && second.has_value());
    EXPECT_FALSE(AuditRing::Take(ring, 1).has_value()) << "it is full, and nobody waits";
    std::memset(first->data(), 1, 100);
    std::memset(second->data(), 2, 100);
    EXPECT_EQ(first->data()[99], std::byte{1});
    const v1::ArenaRange range = second->range();
    EXPECT_EQ(range.arena_id(), 7u);
    EXPECT_EQ(range.offset(), 128u);
    EXPECT_EQ(range.bytes(), 100u);
  }
  EXPECT_TRUE(AuditRing::Take(ring, 256).has_value());
}

TEST(AuditRing, AMovedSlotIsGivenBackOnce) {
  const auto ring = std::make_shared<AuditRing>(HostArena(7, 64));
  auto slot = AuditRing::Take(ring, 64);
  {
    const AuditRing::Slot moved = std::move(*slot);
    slot.reset();
    EXPECT_FALSE(AuditRing::Take(ring, 64).has_value());
  }
  EXPECT_TRUE(AuditRing::Take(ring, 64).has_value());
}

TEST(AuditRing, AnAbandonedSlotStaysTaken) {
  const auto ring = std::make_shared<AuditRing>(HostArena(7, 128));
  AuditRing::Take(ring, 64)->Abandon();
  EXPECT_FALSE(AuditRing::Take(ring, 128).has_value());
  EXPECT_TRUE(AuditRing::Take(ring, 64).has_value());
}

TEST(AuditRing, NoSlotIsLargerThanTheRing) {
  const auto ring = std::make_shared<AuditRing>(HostArena(7, 128));
  EXPECT_FALSE(AuditRing::Take(ring, 129).has_value());
}

TEST(AuditRing, HasRoomForManySlotsUnlessTheyAreVeryLarge) {
  EXPECT_EQ(AuditRing::BytesFor(64), 2048u);
  EXPECT_EQ(AuditRing::BytesFor(100), 4096u);
  EXPECT_EQ(AuditRing::BytesFor(1 << 20), 8u << 20);
  EXPECT_EQ(AuditRing::BytesFor(9 << 20), 16u << 20);
}

}  // namespace
}  // namespace clusterkv::client
