// Grants of a ServiceCore: shared limits, tokens of others, revoking.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

using absl::StatusCode;
using testing::HasSubstr;

constexpr GrantId kA = 0xa, kB = 0xb;

class CoreGrantTest : public CoreTest {
 protected:
  // 32 chunks, of which 24 are offered.
  void Start(CoreOptions options = {}) {
    options.offered_bytes = 24 * kChunk;
    StartCore(std::move(options));
  }
  absl::Status OpenGrant(GrantId grant, uint32_t chunks) {
    Reply<bool> reply;
    core_->OpenGrant(grant, chunks * kChunk, {}, reply.done());
    return reply.Get().status();
  }
  absl::StatusOr<bool> Revoke(GrantId grant) {
    Reply<bool> reply;
    core_->RevokeGrant(grant, absl::AbortedError("revoked by the test"), reply.done());
    return reply.Get();
  }
  // Of about half a chunk.
  absl::StatusOr<SequenceId> RegisterSmall(const Worker& worker) {
    RegisterRequest request = Request(FetchMode::kDirect, worker->next_key++);
    request.max_tokens = 32;
    const auto reply = Register(worker, request);
    if (!reply.ok()) return reply.status();
    return reply->sequence;
  }
  // As many sequences as there is memory for.
  size_t Fill(const Worker& worker) {
    size_t count = 0;
    while (count < 1000) {
      const auto sequence = RegisterSmall(worker);
      if (!sequence.ok()) {
        EXPECT_EQ(sequence.status().code(), StatusCode::kResourceExhausted);
        break;
      }
      ++count;
    }
    return count;
  }
  HostPoolStatus HostOf(GrantId grant) {
    Fence();
    for (const GrantStatus& one : core_->status().grants) {
      if (one.grant == grant) return one.host;
    }
    ADD_FAILURE() << "no such grant";
    return {};
  }
};

TEST_F(CoreGrantTest, SessionsOfAGrantShareItsLimit) {
  Start();
  ASSERT_TRUE(OpenGrant(kA, 4).ok());
  Worker first = Attached(kA);
  Worker second = Attached(kA);
  EXPECT_GT(Fill(first), 0u);
  EXPECT_EQ(HostOf(kA).reserved_bytes, 4 * kChunk);
  const auto refused = RegisterSmall(second);
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("grant 000000000000000a"));
  core_->Goodbye(first->session);
  // The session is gone before its memory is free.
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) {
    return s.sessions.size() == 1 && s.grants.size() == 1 && s.grants[0].host.reserved_bytes == 0;
  }));
  EXPECT_GT(Fill(second), 0u);
}

TEST_F(CoreGrantTest, OthersNeverTakeWhatWasGranted) {
  Start();
  ASSERT_TRUE(OpenGrant(kA, 4).ok());
  ASSERT_TRUE(OpenGrant(kB, 20).ok());
  Worker commons = Attached();
  Worker big = Attached(kB);
  EXPECT_GT(Fill(commons), 0u);
  EXPECT_GT(Fill(big), 0u);
  EXPECT_EQ(core_->status().host.reserved_bytes, 28 * kChunk);
  Worker late = Attached(kA);
  EXPECT_GT(Fill(late), 0u);
  EXPECT_EQ(HostOf(kA).reserved_bytes, 4 * kChunk);
  // A session without a grant is told where the rest is.
  EXPECT_THAT(std::string(RegisterSmall(commons).status().message()),
              HasSubstr("--device-plugin-memory"));
}

TEST_F(CoreGrantTest, ASequenceDoesNotGrowBeyondTheGrant) {
  Start();
  ASSERT_TRUE(OpenGrant(kA, 1).ok());
  Worker worker = Attached(kA);
  RegisterRequest request = Request(FetchMode::kDirect, worker->next_key++);
  request.max_tokens = 4096;  // 2 MiB of rows, a chunk has 64 KiB
  request.reserve_tokens = 64;
  const auto sequence = Register(worker, request);
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  absl::Status last;
  uint32_t position = 0;
  while (last.ok() && position + 64 <= 4096) {
    const auto range = Range(worker, sequence->sequence, position, 64, false);
    const size_t before = worker->told().credit_count;
    last = Ingest(worker, range).status();
    if (!last.ok()) break;
    position += 64;
    ASSERT_TRUE(worker->Await([&](const Told& told) { return told.credit_count > before; }));
  }
  EXPECT_EQ(last.code(), StatusCode::kResourceExhausted);
  EXPECT_GT(position, 0u);
  EXPECT_EQ(HostOf(kA).used_bytes, kChunk);
}

TEST_F(CoreGrantTest, ATokenIsUnknownOnTheSocketsOfOthers) {
  Start();
  ASSERT_TRUE(OpenGrant(kA, 4).ok());
  ASSERT_TRUE(OpenGrant(kB, 4).ok());
  Worker mine = Attached(kA);
  const SequenceId sequence = MustRegister(mine, FetchMode::kServed);
  for (const GrantId other : {kB, kNoGrant}) {
    SessionKey stolen = mine->key;
    stolen.grant = other;
    Worker thief = std::make_shared<FakeWorker>(*core_);
    thief->key = stolen;
    EXPECT_EQ(AllocateArena(thief, 4096).status().code(), StatusCode::kUnauthenticated);
    EXPECT_EQ(Register(thief, Request(FetchMode::kDirect, 9)).status().code(),
              StatusCode::kUnauthenticated);
    EXPECT_EQ(Release(thief, sequence).status().code(), StatusCode::kUnauthenticated);
    EXPECT_EQ(Wait(thief, sequence, 1).status().code(), StatusCode::kUnauthenticated);
    EXPECT_EQ(DoFetch(thief, Fetch(sequence, 0, 0)).status().code(), StatusCode::kUnauthenticated);
    EXPECT_EQ(Attach(thief, stolen).status().code(), StatusCode::kUnauthenticated);
  }
  EXPECT_TRUE(Release(mine, sequence).ok());
}

TEST_F(CoreGrantTest, SeesItsOwnSequencesAndMemoryOnly) {
  Start();
  ASSERT_TRUE(OpenGrant(kA, 4).ok());
  ASSERT_TRUE(OpenGrant(kB, 4).ok());
  Worker a = Attached(kA);
  Worker b = Attached(kB);
  const SequenceId sequence = MustRegister(a, FetchMode::kDirect);
  MustRegister(b, FetchMode::kDirect);
  Reply<std::vector<SequenceStatus>> list;
  core_->ListSequences(std::nullopt, list.done(), kA);
  const auto listed = list.Get();
  ASSERT_TRUE(listed.ok());
  ASSERT_EQ(listed->size(), 1u);
  EXPECT_EQ(listed->front().sequence, sequence);
  EXPECT_EQ(Sequences().size(), 2u);
  const DaemonStatus seen = StatusOfGrant(core_->status(), kA);
  ASSERT_EQ(seen.sessions.size(), 1u);
  EXPECT_EQ(seen.sessions[0].session_id, a->session);
  EXPECT_EQ(seen.sequences, 1u);
  EXPECT_EQ(seen.host.total_bytes, 4 * kChunk);
  EXPECT_GT(seen.host.reserved_bytes, 0u);
  EXPECT_EQ(seen.grants.size(), 1u);
  EXPECT_EQ(seen.gpu_used_bytes, seen.sessions[0].gpu_bytes);
  EXPECT_EQ(StatusOfGrant(core_->status(), kNoGrant).sessions.size(), 2u);
}

TEST_F(CoreGrantTest, RevokingEndsItsSessionsAndLetsNoneIn) {
  Start();
  ASSERT_TRUE(OpenGrant(kA, 4).ok());
  ASSERT_TRUE(OpenGrant(kB, 4).ok());
  Worker mine = Attached(kA);
  Worker unattached = Open(kA);
  Worker other = Attached(kB);
  Worker commons = Attached();
  mine->unmaps_chunks = false;
  const SequenceId sequence = MustRegister(mine, FetchMode::kDirect);
  MustIngest(mine, sequence, 0, 60, true);
  EXPECT_TRUE(*Revoke(kA));
  for (const Worker& worker : {mine, unattached}) {
    ASSERT_EQ(worker->told().ended.size(), 1u);
    EXPECT_EQ(worker->told().ended[0].code(), StatusCode::kAborted);
    EXPECT_EQ(worker->told().ended[0].message(), "revoked by the test");
  }
  EXPECT_TRUE(other->told().ended.empty());
  EXPECT_TRUE(commons->told().ended.empty());
  EXPECT_EQ(OpenOn(kA).code(), StatusCode::kFailedPrecondition);
  EXPECT_FALSE(*Revoke(kA));  // once more does nothing
  EXPECT_EQ(core_->status().sessions_ended[static_cast<size_t>(SessionEnd::kGrantRevoked)], 2u);
  EXPECT_EQ(core_->status().grants.size(), 1u);
  // What its worker still has mapped comes back with the worker's end.
  EXPECT_TRUE(
      AwaitStatus([](const DaemonStatus& s) { return s.host.quarantined_bytes == kChunk; }));
  core_->WorkerDied(mine->session);
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) { return s.host.quarantined_bytes == 0; }));
}

TEST_F(CoreGrantTest, EachGrantHasSessionsOfItsOwnToOpen) {
  Start({.version = "test", .max_sessions = 2});
  ASSERT_TRUE(OpenGrant(kA, 4).ok());
  ASSERT_TRUE(OpenGrant(kB, 4).ok());
  Open(kA);
  Open(kA);
  EXPECT_EQ(OpenOn(kA).code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(OpenOn(kB).ok());
  EXPECT_TRUE(OpenOn(kNoGrant).ok());
}

TEST_F(CoreGrantTest, OpensNothingItWasNotOfferedAndNothingWhileItDrains) {
  Start();
  EXPECT_EQ(OpenGrant(kA, 25).code(), StatusCode::kResourceExhausted);
  ASSERT_TRUE(OpenGrant(kA, 24).ok());
  EXPECT_EQ(OpenGrant(kA, 0).code(), StatusCode::kAlreadyExists);
  std::promise<void> idle;
  core_->Drain(absl::Seconds(5), [&idle] { idle.set_value(); });
  idle.get_future().wait();
  EXPECT_EQ(OpenGrant(kB, 0).code(), StatusCode::kUnavailable);
}

}  // namespace
}  // namespace clusterkv::service
