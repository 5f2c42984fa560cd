// Shared device memory whose importers nobody counts (gpu-sharing legacy): it goes to no other
// worker while one may have it mapped.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>

#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

class CoreKeptMemoryTest : public CoreTest {
 protected:
  // Of a direct sequence of Request().
  static gpu::StateLayout Layout() {
    const RegisterRequest request = Request(FetchMode::kDirect, 1);
    return *gpu::StateLayout::Create(request.shape, request.method.Resolved(request.shape),
                                     request.max_tokens);
  }
  void Start(uint64_t gpu_memory_bytes = 0) {
    CoreOptions options;
    options.gpu_memory_bytes = gpu_memory_bytes;
    StartCore(options);
    device_->counts = false;
  }
  void AwaitReleased() {
    EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) { return s.sequences == 0; }));
  }
};

TEST_F(CoreKeptMemoryTest, OfAReleasedSequenceServesTheSessionsNextOne) {
  Start();
  Worker worker = Attached();
  const auto first = Register(worker, Request(FetchMode::kDirect, worker->next_key++));
  ASSERT_TRUE(first.ok()) << first.status();
  MustIngest(worker, first->sequence, 0, 60, true);
  ASSERT_TRUE(Wait(worker, first->sequence, 0).ok());
  // The worker is slow to unmap it.
  const std::shared_ptr<gpu::Mapping> mapped = worker->told().arenas.at(first->state_arena);
  const auto published = [&] {
    uint32_t segments = 0;
    std::memcpy(&segments, mapped->data() + Layout().published_segments, sizeof(segments));
    return segments;
  };
  EXPECT_GT(published(), 0u);
  ASSERT_TRUE(Release(worker, first->sequence).ok());
  AwaitReleased();
  EXPECT_EQ(core_->status().gpu_used_bytes, kRing + first->state_bytes) << "it is not given back";

  const auto second = Register(worker, Request(FetchMode::kDirect, worker->next_key++));
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(core_->status().gpu_used_bytes, kRing + first->state_bytes) << "nothing new was taken";
  EXPECT_NE(second->state_arena, first->state_arena);
  EXPECT_EQ(published(), 0u) << "the same memory, zeroed";
  MustIngest(worker, second->sequence, 0, 60, true);
  ASSERT_TRUE(Wait(worker, second->sequence, 0).ok());
  EXPECT_GT(published(), 0u);

  core_->Goodbye(worker->session);
  EXPECT_TRUE(AwaitNothingHeld());
}

TEST_F(CoreKeptMemoryTest, ServesArenasThatAreNoLarger) {
  Start();
  Worker worker = Attached();
  const auto sequence = Register(worker, Request(FetchMode::kDirect, worker->next_key++));
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  ASSERT_TRUE(Release(worker, sequence->sequence).ok());
  AwaitReleased();
  const auto larger = AllocateArena(worker, sequence->state_bytes + 4096);
  ASSERT_TRUE(larger.ok()) << larger.status();
  EXPECT_EQ(core_->status().gpu_used_bytes, kRing + sequence->state_bytes + larger->bytes);
  const auto smaller = AllocateArena(worker, 4096);
  ASSERT_TRUE(smaller.ok()) << smaller.status();
  EXPECT_EQ(smaller->bytes, sequence->state_bytes) << "all of it";
  EXPECT_EQ(core_->status().gpu_used_bytes, kRing + sequence->state_bytes + larger->bytes);
  core_->WorkerDied(worker->session);
  EXPECT_TRUE(AwaitNothingHeld());
}

TEST_F(CoreKeptMemoryTest, GoesToNoOtherWorkerBeforeItsOwnIsGone) {
  Start(2 * kRing + Layout().total_bytes * 3 / 2);  // room for one sequence
  Worker first = Attached();
  Worker second = Attached();
  MustRegister(first, FetchMode::kDirect);
  core_->EndSession(first->session, absl::OkStatus());  // the process lives, and may map it
  EXPECT_TRUE(AwaitStatus(
      [](const DaemonStatus& s) { return s.sessions.size() == 1 && s.sequences == 0; }));
  EXPECT_EQ(Register(second, Request(FetchMode::kDirect, 1)).status().code(),
            absl::StatusCode::kResourceExhausted);
  core_->WorkerDied(first->session);
  EXPECT_TRUE(Register(second, Request(FetchMode::kDirect, 2)).ok());
  core_->Goodbye(second->session);
  EXPECT_TRUE(AwaitNothingHeld());
}

TEST_F(CoreKeptMemoryTest, IsKeptWhereRegisteringFails) {
  Start();
  Worker worker = Attached();
  const auto first = Register(worker, Request(FetchMode::kDirect, worker->next_key++));
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(Release(worker, first->sequence).ok());
  AwaitReleased();
  Worker other = Attached();
  while (Register(other, Request(FetchMode::kServed, other->next_key++)).ok()) {
  }
  const auto refused = Register(worker, Request(FetchMode::kDirect, worker->next_key++));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), testing::HasSubstr("host pool"));
  core_->Goodbye(other->session);
  EXPECT_TRUE(AwaitStatus([&](const DaemonStatus& s) {
    return s.sequences == 0 && s.gpu_used_bytes == kRing + first->state_bytes;
  }));
  core_->Goodbye(worker->session);
  EXPECT_TRUE(AwaitNothingHeld());
}

}  // namespace
}  // namespace clusterkv::service
