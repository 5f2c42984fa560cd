// Accounts of the host pool: limits, what is kept for whom, quarantine.
#include "service/host_account.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include "tests/gpu/seed.h"
#include "tests/service/temporary_pool.h"

namespace clusterkv::service {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::HasSubstr;
using Source = HostPool::Source;

constexpr uint64_t kChunk = 16 << 10;

class HostAccountTest : public testing::Test {
 protected:
  std::shared_ptr<HostAccount> Open(GrantId grant, uint32_t chunks,
                                    const std::vector<GrantId>& former = {}) {
    EXPECT_TRUE(accounts_.Open(grant, chunks * kChunk, former).ok());
    return accounts_.Find(grant);
  }
  // All the way from free to lent; stops at the first refusal.
  static std::vector<PoolChunk> Take(HostAccount& account, int chunks) {
    std::vector<PoolChunk> taken;
    for (int i = 0; i < chunks; ++i) {
      const auto chunk = account.Lend(Source::kFree);
      if (!chunk.ok()) break;
      taken.push_back(*chunk);
    }
    return taken;
  }
  static void Quarantine(HostAccount& account, const std::vector<PoolChunk>& chunks) {
    for (const PoolChunk chunk : chunks) account.Quarantine(chunk);
  }
  static void Recycle(HostAccount& account, const std::vector<PoolChunk>& chunks) {
    for (const PoolChunk chunk : chunks) account.Recycle(chunk);
  }

  TemporaryPool pool_{10, kChunk};
  HostAccounts accounts_{*pool_, 8 * kChunk};
  HostAccount& commons_ = *accounts_.Find(kNoGrant);
};

TEST_F(HostAccountTest, AGrantIsHeldToItsLimitAndSaysSo) {
  const auto grant = Open(0xabc, 3);
  ASSERT_TRUE(grant->Reserve(1).ok());
  EXPECT_EQ(Take(*grant, 9).size(), 2u);
  const absl::Status full = grant->Reserve(1);
  EXPECT_EQ(full.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()),
              AllOf(HasSubstr("grant 0000000000000abc"), HasSubstr("16384 bytes asked for"),
                    HasSubstr("49152 of 49152 in use"), HasSubstr("32768 lent, 16384 reserved")));
  grant->Unreserve(1);
  EXPECT_TRUE(grant->Reserve(1).ok());
  EXPECT_TRUE(grant->Lend(Source::kReserved).ok());
  const HostPoolStatus status = grant->status();
  EXPECT_EQ(status.total_bytes, 3 * kChunk);
  EXPECT_EQ(status.used_bytes, 3 * kChunk);
  EXPECT_EQ(status.free_bytes(), 0u);
}

TEST_F(HostAccountTest, TheCommonsNeverTakesWhatIsOfferedGrantedOrNot) {
  EXPECT_EQ(commons_.limit_chunks(), 2u);
  EXPECT_EQ(Take(commons_, 9).size(), 2u);
  const absl::Status full = commons_.Reserve(1);
  EXPECT_EQ(full.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()),
              AllOf(HasSubstr("32768 of 32768 in use"), HasSubstr("131072 more are kept"),
                    HasSubstr("--device-plugin-memory")));
  EXPECT_EQ(Take(*Open(1, 5), 9).size(), 5u);
  EXPECT_EQ(Take(*Open(2, 3), 9).size(), 3u);
  EXPECT_EQ(pool_->available_chunks(), 0u);
}

TEST_F(HostAccountTest, OpensNoMoreThanIsOffered) {
  Open(1, 5);
  EXPECT_EQ(accounts_.Open(1, kChunk).code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(accounts_.Open(2, 4 * kChunk).code(), StatusCode::kResourceExhausted);
  Open(2, 3);
  EXPECT_EQ(accounts_.Open(3, kChunk).code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(accounts_.Open(3, 0).ok());  // of one whose devices are no more
  EXPECT_EQ(accounts_.Find(3)->Reserve(1).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(accounts_.Find(4), nullptr);
  accounts_.Close(1);
  EXPECT_EQ(accounts_.Find(1), nullptr);
  EXPECT_TRUE(accounts_.Open(5, 5 * kChunk).ok());
  accounts_.Close(99);  // nothing
}

TEST_F(HostAccountTest, WhatIsInQuarantineStillCounts) {
  const auto grant = Open(1, 4);
  const auto chunks = Take(*grant, 4);
  Quarantine(*grant, chunks);
  EXPECT_EQ(grant->Reserve(1).code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(grant->Reserve(1).message()), HasSubstr("65536 in quarantine"));
  Recycle(*grant, {chunks[0]});
  EXPECT_TRUE(grant->Reserve(1).ok());
  EXPECT_FALSE(grant->Reserve(1).ok());
}

// The worker of a revoked grant lives on and has its chunks mapped: those who come after it on its
// devices feel that, and nobody else.
TEST_F(HostAccountTest, TheQuarantineOfARevokedGrantIsItsSuccessorsLoss) {
  const auto old = Open(1, 4);
  const auto stuck = Take(*old, 3);
  accounts_.Close(1);
  Quarantine(*old, stuck);
  EXPECT_EQ(old->Reserve(1).code(), StatusCode::kFailedPrecondition);
  const auto successor = Open(2, 4, {1, 99});
  const auto other = Open(3, 3);
  EXPECT_EQ(Take(*successor, 9).size(), 1u);
  const absl::Status full = successor->Reserve(1);
  EXPECT_EQ(full.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("49152 that former grants"));
  EXPECT_EQ(Take(commons_, 9).size(), 2u);
  EXPECT_EQ(Take(*other, 9).size(), 3u);
  EXPECT_EQ(Take(*Open(4, 1), 9).size(), 1u);
  EXPECT_EQ(pool_->available_chunks(), 0u);
  Recycle(*old, stuck);
  EXPECT_EQ(Take(*successor, 9).size(), 3u);
}

TEST_F(HostAccountTest, ADebtGoesOnFromOneSuccessorToTheNext) {
  const auto first = Open(1, 4);
  const auto stuck = Take(*first, 4);
  accounts_.Close(1);
  Quarantine(*first, stuck);
  Open(2, 4, {1});  // never gets anything, and is revoked
  accounts_.Close(2);
  const auto third = Open(3, 2, {2});
  EXPECT_EQ(Take(*third, 9).size(), 0u);
  Recycle(*first, {stuck[0], stuck[1], stuck[2]});
  EXPECT_EQ(Take(*third, 9).size(), 1u);
  Recycle(*first, {stuck[3]});
  EXPECT_EQ(Take(*third, 9).size(), 1u);
}

TEST_F(HostAccountTest, WithNothingOfferedTheCommonsIsThePool) {
  TemporaryPool pool(3, kChunk);
  EXPECT_EQ(pool.account().limit_chunks(), 3u);
  EXPECT_EQ(Take(pool.account(), 9).size(), 3u);
  EXPECT_THAT(std::string(pool.account().Reserve(1).message()), HasSubstr("host pool: 1 chunks"));
}

// However grants come, go and leave memory in quarantine: the pool itself never refuses, so that
// every grant without debts can get all of its limit.
TEST(HostAccounts, RandomHistoriesKeepEveryPromise) {
  const uint64_t seed = gpu::TestSeed();
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  constexpr size_t kDevices = 9;  // one chunk each
  struct Holder {
    GrantId id = kNoGrant;
    std::set<size_t> devices = {};
    std::shared_ptr<HostAccount> account = nullptr;
    std::vector<PoolChunk> lent = {}, quarantined = {};
  };
  for (int round = 0; round < 40; ++round) {
    TemporaryPool pool(kDevices + 3, kChunk);
    HostAccounts accounts(*pool, kDevices * kChunk);
    std::vector<Holder> holders{{.account = accounts.Find(kNoGrant)}}, revoked;
    std::vector<GrantId> former(kDevices, kNoGrant);
    GrantId next = 1;
    const auto revoke = [&](size_t index) {
      Holder& holder = holders[index];
      accounts.Close(holder.id);
      for (const PoolChunk chunk : holder.lent) {
        holder.account->Quarantine(chunk);
        holder.quarantined.push_back(chunk);
      }
      holder.lent.clear();
      for (const size_t device : holder.devices) former[device] = holder.id;
      revoked.push_back(std::move(holder));
      holders.erase(holders.begin() + static_cast<ptrdiff_t>(index));
    };
    const auto allocate = [&] {
      Holder made{.id = next++};
      for (uint64_t n = 1 + random() % 4; n > 0; --n) made.devices.insert(random() % kDevices);
      std::vector<GrantId> before;
      for (size_t i = holders.size() - 1; i > 0; --i) {
        const bool shared = std::ranges::any_of(
            made.devices, [&](size_t device) { return holders[i].devices.contains(device); });
        if (shared) revoke(i);
      }
      for (const size_t device : made.devices) before.push_back(former[device]);
      ASSERT_TRUE(accounts.Open(made.id, made.devices.size() * kChunk, before).ok());
      made.account = accounts.Find(made.id);
      holders.push_back(std::move(made));
    };
    for (int step = 0; step < 400; ++step) {
      Holder& holder = holders[random() % holders.size()];
      switch (random() % 6) {
        case 0:
          allocate();
          break;
        case 1:
          if (holder.lent.empty()) break;
          holder.account->Quarantine(holder.lent.back());
          holder.quarantined.push_back(holder.lent.back());
          holder.lent.pop_back();
          break;
        case 2: {
          Holder& from = revoked.empty() ? holder : revoked[random() % revoked.size()];
          for (const PoolChunk chunk : from.quarantined) from.account->Recycle(chunk);
          from.quarantined.clear();
          break;
        }
        default:
          if (const auto chunk = holder.account->Lend(Source::kFree); chunk.ok()) {
            holder.lent.push_back(*chunk);
          }
      }
      for (const Holder& one : holders) {
        const bool indebted = std::ranges::any_of(revoked, [&](const Holder& old) {
          return !old.quarantined.empty() && one.id != kNoGrant;
        });
        if (indebted) continue;
        const auto rest = static_cast<uint32_t>(one.account->limit_chunks() - one.lent.size() -
                                                one.quarantined.size());
        ASSERT_TRUE(one.account->Reserve(rest).ok()) << "round " << round << " step " << step;
        ASSERT_FALSE(one.account->Reserve(1).ok());
        one.account->Unreserve(rest);
      }
      // Whoever of two has room by its account gets it from the pool.
      for (const Holder& one : holders) {
        const absl::Status asked = one.account->Reserve(1);
        if (asked.ok()) one.account->Unreserve(1);
        ASSERT_EQ(std::string(asked.message()).find("chunks of"), std::string::npos) << asked;
      }
    }
  }
}

}  // namespace
}  // namespace clusterkv::service
