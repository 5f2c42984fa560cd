#include "service/session_memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "tests/gpu/seed.h"
#include "tests/service/recorded_chunks.h"
#include "tests/service/temporary_pool.h"

namespace clusterkv::service {
namespace {

constexpr uint64_t kChunk = 16 << 10;

class SessionMemoryTest : public testing::Test {
 protected:
  uint64_t used() const { return pool_->status().used_bytes / kChunk; }
  uint64_t reserved() const { return pool_->status().reserved_bytes / kChunk; }
  uint64_t quarantined() const { return pool_->status().quarantined_bytes / kChunk; }

  TemporaryPool pool_{4, kChunk};
  RecordedChunks chunks_{pool_.account()};
  SessionMemory memory_{pool_.account(), chunks_};
};

TEST_F(SessionMemoryTest, FractionsOfSequencesAddUpToWholeChunks) {
  ASSERT_TRUE(memory_.AddReservation(0.4).ok());
  EXPECT_EQ(reserved(), 1u);
  ASSERT_TRUE(memory_.AddReservation(0.6).ok());
  EXPECT_EQ(reserved(), 1u);
  ASSERT_TRUE(memory_.AddReservation(0.1).ok());
  EXPECT_EQ(reserved(), 2u);
  memory_.RemoveReservation(0.6);
  EXPECT_EQ(reserved(), 1u);
  memory_.RemoveReservation(0.4);
  memory_.RemoveReservation(0.1);
  EXPECT_EQ(reserved(), 0u);
}

TEST_F(SessionMemoryTest, RefusedReservationChangesNothing) {
  ASSERT_TRUE(memory_.AddReservation(2.5).ok());
  for (const double chunks : {1.6, 100.0, 1e18}) {
    EXPECT_EQ(memory_.AddReservation(chunks).code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(reserved(), 3u);
  }
  EXPECT_TRUE(memory_.AddReservation(1.5).ok());
  EXPECT_EQ(reserved(), 4u);
}

TEST_F(SessionMemoryTest, ReservationsOfSessionsDoNotOverlap) {
  RecordedChunks others(pool_.account());
  SessionMemory other(pool_.account(), others);
  ASSERT_TRUE(memory_.AddReservation(3).ok());
  EXPECT_EQ(other.AddReservation(1.5).code(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(other.AddReservation(1).ok());
  EXPECT_TRUE(memory_.Allocate(kChunk).ok());
  EXPECT_TRUE(memory_.Allocate(kChunk).ok());
  EXPECT_TRUE(memory_.Allocate(kChunk).ok());
  EXPECT_EQ(memory_.Allocate(1).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(other.Allocate(kChunk).ok());
}

TEST_F(SessionMemoryTest, LendsFromItsReserveFirst) {
  ASSERT_TRUE(memory_.AddReservation(1).ok());
  ASSERT_TRUE(memory_.Allocate(kChunk).ok());
  EXPECT_EQ(used(), 1u);
  EXPECT_EQ(reserved(), 0u);
  EXPECT_EQ(memory_.lent_bytes(), kChunk);
}

TEST_F(SessionMemoryTest, GrowsBeyondItsReserveWhileThePoolHasRoom) {
  ASSERT_TRUE(memory_.AddReservation(1).ok());
  std::vector<Extent> extents;
  for (int i = 0; i < 4; ++i) {
    auto extent = memory_.Allocate(kChunk);
    ASSERT_TRUE(extent.ok()) << extent.status();
    extents.push_back(*extent);
  }
  EXPECT_EQ(used(), 4u);
  EXPECT_EQ(memory_.Allocate(1).status().code(), absl::StatusCode::kResourceExhausted);
  // What goes beyond what is needed is asked back as it becomes empty.
  memory_.Free(extents[0]);
  EXPECT_EQ(chunks_.revoked, std::set<uint32_t>{extents[0].chunk});
  EXPECT_EQ(used(), 3u);
  EXPECT_EQ(quarantined(), 1u);
}

TEST_F(SessionMemoryTest, ExtentLargerThanAChunkIsRefusedAndLendsNothing) {
  EXPECT_EQ(memory_.Allocate(kChunk + 1).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(memory_.Allocate(~uint64_t{0} - 4096).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(chunks_.lent, 0u);
}

TEST_F(SessionMemoryTest, KeepsAnEmptyChunkThatASequenceStillNeeds) {
  ASSERT_TRUE(memory_.AddReservation(1).ok());
  const Extent extent = *memory_.Allocate(256);
  memory_.Free(extent);
  EXPECT_TRUE(chunks_.revoked.empty());
  EXPECT_EQ(memory_.Allocate(256)->chunk, extent.chunk);
  memory_.Free(extent);
  memory_.RemoveReservation(1);
  EXPECT_EQ(chunks_.revoked, std::set<uint32_t>{extent.chunk});
}

TEST_F(SessionMemoryTest, ChunkComesBackOnceTheWorkerGaveItUp) {
  const Extent extent = *memory_.Allocate(kChunk);
  ASSERT_TRUE(memory_.ConfirmMapped(extent.chunk).ok());
  EXPECT_TRUE(memory_.mapped(extent.chunk));
  memory_.Free(extent);
  EXPECT_EQ(quarantined(), 1u);
  EXPECT_TRUE(chunks_.returned.empty());
  ASSERT_TRUE(memory_.ConfirmUnmapped(extent.chunk).ok());
  EXPECT_EQ(chunks_.returned.size(), 1u);
  EXPECT_EQ(quarantined(), 1u);  // until it is zeroed
  chunks_.Recycle();
  EXPECT_EQ(quarantined(), 0u);
  EXPECT_TRUE(memory_.holds_nothing());
}

TEST_F(SessionMemoryTest, NumberIsUsedAgainOnlyAfterTheWorkerGaveItUp) {
  const Extent first = *memory_.Allocate(kChunk);
  ASSERT_TRUE(memory_.ConfirmMapped(first.chunk).ok());
  memory_.Free(first);
  const Extent second = *memory_.Allocate(kChunk);
  EXPECT_NE(second.chunk, first.chunk);
  chunks_.GiveUpRevoked(memory_);
  const Extent third = *memory_.Allocate(kChunk);
  EXPECT_EQ(third.chunk, first.chunk);
  EXPECT_FALSE(memory_.mapped(third.chunk));  // the old word does not count
}

TEST_F(SessionMemoryTest, LivesThroughMoreChunksThanThereAreNumbers) {
  for (int i = 0; i < 70'000; ++i) {
    auto extent = memory_.Allocate(kChunk);
    ASSERT_TRUE(extent.ok()) << i << ": " << extent.status();
    memory_.Free(*extent);
    chunks_.GiveUpRevoked(memory_);
  }
}

TEST_F(SessionMemoryTest, BelievesOnlyWhatCanBe) {
  EXPECT_EQ(memory_.ConfirmMapped(0).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(memory_.ConfirmUnmapped(0).code(), absl::StatusCode::kInvalidArgument);
  const Extent extent = *memory_.Allocate(kChunk);
  EXPECT_EQ(memory_.ConfirmMapped(~0u).code(), absl::StatusCode::kInvalidArgument);
  // It may not give up what it has not been asked for: it is in use.
  EXPECT_EQ(memory_.ConfirmUnmapped(extent.chunk).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(used(), 1u);
  memory_.Free(extent);
  EXPECT_TRUE(memory_.ConfirmMapped(extent.chunk).ok());  // its word crossed ours
  EXPECT_EQ(memory_.ConfirmMapped(extent.chunk).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(memory_.ConfirmUnmapped(extent.chunk).ok());
  EXPECT_EQ(memory_.ConfirmUnmapped(extent.chunk).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(chunks_.returned.size(), 1u);
}

TEST_F(SessionMemoryTest, EndQuarantinesAllUntilTheWorkerIsGone) {
  ASSERT_TRUE(memory_.AddReservation(2).ok());
  const Extent kept = *memory_.Allocate(kChunk);
  const Extent freed = *memory_.Allocate(kChunk);
  ASSERT_TRUE(memory_.Allocate(kChunk).ok());
  memory_.Free(freed);
  memory_.Free(kept);
  memory_.QuarantineAll();
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(reserved(), 0u);
  EXPECT_EQ(quarantined(), 3u);
  EXPECT_EQ(memory_.lent_bytes(), 0u);
  memory_.QuarantineAll();  // once more changes nothing
  EXPECT_EQ(quarantined(), 3u);
  EXPECT_FALSE(memory_.holds_nothing());
  EXPECT_TRUE(chunks_.returned.empty());
  memory_.ReleaseAll();
  EXPECT_EQ(chunks_.returned.size(), 3u);
  EXPECT_TRUE(memory_.holds_nothing());
  chunks_.Recycle();
  EXPECT_EQ(quarantined(), 0u);
}

// Sessions that share a pool, against the sums that must hold after each step.
class RandomSession {
 public:
  explicit RandomSession(HostAccount& account) : chunks_(account), memory_(account, chunks_) {}

  void Step(std::mt19937_64& random) {
    switch (random() % 6) {
      case 0: {
        const double chunks = static_cast<double>(random() % 300) / 100;
        if (memory_.AddReservation(chunks).ok()) reservations_.push_back(chunks);
        break;
      }
      case 1:
        if (!reservations_.empty()) {
          memory_.RemoveReservation(reservations_.back());
          reservations_.pop_back();
        }
        break;
      case 2:
      case 3:
        if (auto extent = memory_.Allocate(1 + random() % kChunk); extent.ok()) {
          extents_.push_back(*extent);
        }
        break;
      case 4:
        if (!extents_.empty()) {
          std::swap(extents_[random() % extents_.size()], extents_.back());
          memory_.Free(extents_.back());
          extents_.pop_back();
        }
        break;
      default:
        chunks_.GiveUpRevoked(memory_);
    }
  }
  uint64_t lent() const { return chunks_.granted.size(); }
  uint64_t reserved() const {
    double needed = 0;
    for (const double chunks : reservations_) needed += chunks;
    const auto whole = static_cast<uint64_t>(std::ceil(needed - 1e-6));
    return needed > 0 && whole > lent() ? whole - lent() : 0;
  }
  uint64_t quarantined() const { return chunks_.revoked.size(); }
  void End() {
    memory_.QuarantineAll();
    memory_.ReleaseAll();
    chunks_.Recycle();
  }

 private:
  RecordedChunks chunks_;
  SessionMemory memory_;
  std::vector<double> reservations_;
  std::vector<Extent> extents_;
};

TEST(SessionMemory, RandomHistoriesKeepThePoolsAccount) {
  const uint64_t seed = gpu::TestSeed();
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  TemporaryPool pool(12, kChunk);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::unique_ptr<RandomSession>> sessions;
    for (int i = 0; i < 3; ++i) {
      sessions.push_back(std::make_unique<RandomSession>(pool.account()));
    }
    for (int step = 0; step < 300; ++step) {
      sessions[random() % sessions.size()]->Step(random);
      uint64_t lent = 0, reserved = 0, quarantined = 0;
      for (const auto& session : sessions) {
        lent += session->lent();
        reserved += session->reserved();
        quarantined += session->quarantined();
      }
      const HostPoolStatus status = pool->status();
      ASSERT_EQ(status.used_bytes, lent * kChunk) << "round " << round << " step " << step;
      ASSERT_EQ(status.reserved_bytes, reserved * kChunk);
      ASSERT_EQ(status.quarantined_bytes, quarantined * kChunk);
      ASSERT_LE(lent + reserved + quarantined, 12u);
    }
    for (const auto& session : sessions) session->End();
    const HostPoolStatus status = pool->status();
    ASSERT_EQ(status.free_bytes(), status.total_bytes);
  }
}

}  // namespace
}  // namespace clusterkv::service
