// Sequences of a ServiceCore: registration, limits, ingest, publishing, waiting, release.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "gpu/segment_plan.h"
#include "tests/gpu/seed.h"
#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

using absl::StatusCode;

class CoreSequenceTest : public CoreTest {
 protected:
  StatusCode RegisterCode(const Worker& worker, const RegisterRequest& request) {
    return Register(worker, request).status().code();
  }
  StatusCode IngestCode(const Worker& worker, const IngestRequest& request) {
    return Ingest(worker, request).status().code();
  }
};

// --- Registration -----------------------------------------------------------------------------

TEST_F(CoreSequenceTest, DirectStateIsGrantedServedStateIsNot) {
  StartCore();
  Worker worker = Attached();
  const auto direct = Register(worker, Request(FetchMode::kDirect, 1));
  const auto served = Register(worker, Request(FetchMode::kServed, 2));
  ASSERT_TRUE(direct.ok() && served.ok());
  EXPECT_NE(direct->state_arena, 0u);
  EXPECT_EQ(served->state_arena, 0u);
  EXPECT_NE(direct->generation, served->generation);
  EXPECT_EQ(worker->told().arenas.at(direct->state_arena)->bytes(), direct->state_bytes);
  EXPECT_EQ(worker->told().arenas.size(), 2u);  // and the ring
  EXPECT_EQ(core_->status().gpu_used_bytes, kRing + direct->state_bytes + served->state_bytes);
  EXPECT_EQ(Sequences().size(), 2u);
}

TEST_F(CoreSequenceTest, ARepeatedRegistrationIsTheSameSequence) {
  StartCore();
  Worker worker = Attached();
  const RegisterRequest request = Request(FetchMode::kDirect, 5);
  Reply<RegisterReply> first, second;  // the second comes while the state is being made
  core_->RegisterSequence(worker->key, request, first.done());
  core_->RegisterSequence(worker->key, request, second.done());
  ASSERT_TRUE(first.Get().ok() && second.Get().ok());
  EXPECT_EQ(first.Get()->sequence, second.Get()->sequence);
  EXPECT_EQ(Register(worker, request)->generation, first.Get()->generation);
  RegisterRequest other = request;
  other.max_tokens += 1;
  EXPECT_EQ(RegisterCode(worker, other), StatusCode::kAlreadyExists);
  EXPECT_EQ(Sequences().size(), 1u);
  // Keys are of the session.
  EXPECT_NE(Register(Attached(), request)->sequence, first.Get()->sequence);
  // Once it is released the key is free.
  EXPECT_TRUE(*Release(worker, first.Get()->sequence));
  EXPECT_TRUE(Register(worker, other).ok());
}

TEST_F(CoreSequenceTest, RefusesWhatCannotBeAndHoldsNothingOfIt) {
  StartCore();
  Worker worker = Attached();
  const auto code = [&](const std::function<void(RegisterRequest&)>& change) {
    RegisterRequest request = Request(FetchMode::kDirect, worker->next_key++);
    change(request);
    return RegisterCode(worker, request);
  };
  const auto invalid = StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto& r) { r.idempotency_key = 0; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.shape.layers = 0; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.shape.kv_heads = ~0u; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.shape.head_dim = 65; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.max_tokens = 0; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.max_tokens = ~0u; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.reserve_tokens = r.max_tokens + 1; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.method.tokens_per_cluster = 0; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.method.cache_tokens = 1; }), invalid);
  // A segment that no chunk holds.
  EXPECT_EQ(code([](auto& r) {
              r.method.prompt_segment_tokens = 8192;
              r.max_tokens = 8192;
            }),
            invalid);
  // More than the pool has.
  EXPECT_EQ(code([](auto& r) { r.max_tokens = 100'000; }), StatusCode::kResourceExhausted);
  device_->fail_shared = true;
  EXPECT_EQ(code([](auto&) {}), StatusCode::kResourceExhausted);
  EXPECT_EQ(AllocateArena(worker, 4096).status().code(), StatusCode::kResourceExhausted);
  device_->fail_shared = false;
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) {
    return s.sequences == 0 && s.gpu_used_bytes == kRing && s.host.reserved_bytes == 0;
  }));
}

TEST_F(CoreSequenceTest, BoundsSequencesArenasAndGpuMemory) {
  const uint64_t state =
      gpu::StateLayout::Create(
          Request(FetchMode::kDirect, 1).shape,
          Request(FetchMode::kDirect, 1).method.Resolved(Request(FetchMode::kDirect, 1).shape), 256)
          ->total_bytes;
  StartCore({.version = "test",
             .gpu_memory_bytes = kRing + 2 * state + 4096,
             .max_sequences_per_session = 3,
             .max_arenas_per_session = 2});
  Worker worker = Attached();
  const SequenceId first = MustRegister(worker, FetchMode::kDirect);
  MustRegister(worker, FetchMode::kServed);
  EXPECT_EQ(RegisterCode(worker, Request(FetchMode::kDirect, 9)), StatusCode::kResourceExhausted);
  EXPECT_EQ(AllocateArena(worker, 4097).status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(AllocateArena(worker, 0).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(AllocateArena(worker, ~uint64_t{0}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(AllocateArena(worker, 1)->bytes, 4096u);
  EXPECT_EQ(AllocateArena(worker, 1).status().code(), StatusCode::kResourceExhausted);
  // What is released can be had again.
  EXPECT_TRUE(*Release(worker, first));
  EXPECT_TRUE(worker->told().revoked_arenas.size() == 1);
  MustRegister(worker, FetchMode::kDirect);
}

TEST_F(CoreSequenceTest, ReservationsAdmitOnlyWhatThePoolHolds) {
  StartCore();
  Worker worker = Attached();
  size_t admitted = 0;
  StatusCode refused = StatusCode::kOk;
  while (refused == StatusCode::kOk) {
    RegisterRequest request = Request(FetchMode::kServed, worker->next_key++);
    request.max_tokens = 800;  // about 9 of 32 chunks
    refused = RegisterCode(worker, request);
    admitted += refused == StatusCode::kOk;
  }
  EXPECT_EQ(refused, StatusCode::kResourceExhausted);
  EXPECT_GE(admitted, 1u);
  EXPECT_EQ(Sequences().size(), admitted);
  // A smaller reserve is let in.
  RegisterRequest request = Request(FetchMode::kServed, worker->next_key++);
  request.reserve_tokens = 4;  // sinks
  EXPECT_EQ(RegisterCode(worker, request), StatusCode::kOk);
}

TEST_F(CoreSequenceTest, SequencesAreOfTheirSessionAlone) {
  StartCore();
  Worker owner = Attached();
  Worker other = Attached();
  const SequenceId sequence = MustRegister(owner, FetchMode::kDirect);
  EXPECT_EQ(Release(other, sequence).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(IngestCode(other, Range(other, sequence, 0, 1, false)), StatusCode::kNotFound);
  EXPECT_EQ(Wait(other, sequence, 1).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(Release(owner, sequence + 1).status().code(), StatusCode::kNotFound);
  EXPECT_TRUE(*Release(owner, sequence));
  EXPECT_EQ(Release(owner, sequence).status().code(), StatusCode::kNotFound);
}

// --- Ingest -----------------------------------------------------------------------------------

TEST_F(CoreSequenceTest, TakesRangesInOrderAndGivesTheCreditsBack) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  EXPECT_EQ(IngestCode(worker, Range(worker, sequence, 1, 1, false)),
            StatusCode::kFailedPrecondition);
  MustIngest(worker, sequence, 0, 10, false);
  EXPECT_EQ(IngestCode(worker, Range(worker, sequence, 0, 10, false)),
            StatusCode::kFailedPrecondition);
  MustIngest(worker, sequence, 10, 50, true);
  EXPECT_EQ(Sequences()[0].ingested_tokens, 60u);
  EXPECT_EQ(Sequences()[0].prompt_tokens, 60u);
  // Only tokens of the decode come after it.
  EXPECT_EQ(IngestCode(worker, Range(worker, sequence, 60, 1, true)),
            StatusCode::kFailedPrecondition);
  MustIngest(worker, sequence, 60, 5, false);
  EXPECT_EQ(worker->told().credit_count, 3u);
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) { return s.ingested_tokens == 65; }));
}

TEST_F(CoreSequenceTest, RefusesRangesThatLieWrong) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  const auto code = [&](const std::function<void(IngestRequest&)>& change) {
    IngestRequest request = Range(worker, sequence, 0, 10, false);
    change(request);
    return IngestCode(worker, request);
  };
  const auto invalid = StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto& r) { r.count = 0; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.layer_count = 0; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.layer_count = 3; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.layer_begin = 2; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.layer_begin = ~0u; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.idempotency_key = 0; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.count = 257; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](auto& r) { r.count = ~0u; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](auto& r) { r.position = r.count = ~0u; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](auto& r) { r.arena = 99; }), StatusCode::kNotFound);
  EXPECT_EQ(code([](auto& r) { r.arena = 0; }), StatusCode::kNotFound);
  EXPECT_EQ(code([](auto& r) { r.ring_offset = 32; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.ring_offset = kRing; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.ring_offset = kRing - 64; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.ring_offset = ~uint64_t{63}; }), invalid);
  // The state of a sequence is no ring.
  EXPECT_EQ(code([&](auto& r) { r.arena = worker->ring + 1; }), StatusCode::kNotFound);
  EXPECT_EQ(worker->told().credit_count, 0u);
  EXPECT_EQ(Sequences()[0].host_bytes, 0u);
  MustIngest(worker, sequence, 0, 10, false);
}

TEST_F(CoreSequenceTest, ARangeBeginsOnlySoManySegments) {
  StartCore();
  Worker worker = Attached();
  RegisterRequest request = Request(FetchMode::kServed, worker->next_key++);
  request.method.prompt_segment_tokens = request.method.decode_segment_tokens = 1;
  request.method.min_window_tokens = 30'000;
  request.method.window_lag_segments = 0;
  request.max_tokens = 100'000;
  request.reserve_tokens = 4;
  const auto registered = Register(worker, request);
  ASSERT_TRUE(registered.ok()) << registered.status();
  const auto refusal = [&](uint32_t count, uint32_t layers, bool end) {
    IngestRequest range = Range(worker, registered->sequence, 0, count, end);
    range.layer_count = layers;
    const absl::Status status = Ingest(worker, range).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  using testing::HasSubstr;
  EXPECT_THAT(refusal(65'537, 1, false), HasSubstr("begin up to 65537 segments"));
  EXPECT_THAT(refusal(32'769, 2, false), HasSubstr("begin up to 65538 segments"));
  EXPECT_THAT(refusal(35'537, 1, true), HasSubstr("begin up to 65537 segments"));
  // Those are not too many, but the ring is too short for them.
  EXPECT_THAT(refusal(65'536, 1, false), HasSubstr("do not lie in arena"));
  EXPECT_THAT(refusal(35'536, 1, true), HasSubstr("do not lie in arena"));
  EXPECT_EQ(Sequences()[0].host_bytes, 0u);
  MustIngest(worker, registered->sequence, 0, 500, false);

  request.idempotency_key = worker->next_key++;
  request.method.min_window_tokens = 65'536;
  const absl::Status never = Register(worker, request).status();
  EXPECT_EQ(never.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(never.message()), HasSubstr("may begin 65537 segments"));
}

TEST_F(CoreSequenceTest, ARepeatedRangeIsTakenOnce) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  const IngestRequest request = Range(worker, sequence, 0, 40, false);
  EXPECT_TRUE(Ingest(worker, request).ok());
  EXPECT_TRUE(Ingest(worker, request).ok());
  EXPECT_TRUE(worker->Await([](const Told& told) { return told.credit_count > 0; }));
  EXPECT_EQ(*Ingest(worker, request), 40u);
  Fence();
  EXPECT_EQ(worker->told().credit_count, 1u);
  IngestRequest stale = Range(worker, sequence, 40, 1, false);
  stale.idempotency_key = request.idempotency_key;
  EXPECT_EQ(IngestCode(worker, stale), StatusCode::kInvalidArgument);
}

TEST_F(CoreSequenceTest, ARangeIsNotReusedBeforeItsCredit) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  device_->stage.Close();
  EXPECT_TRUE(Ingest(worker, Range(worker, sequence, 0, 10, false)).ok());
  IngestRequest next = Range(worker, sequence, 10, 10, false);
  EXPECT_EQ(IngestCode(worker, next), StatusCode::kResourceExhausted);
  next.ring_offset = 10 * 512 - 64;
  EXPECT_EQ(IngestCode(worker, next), StatusCode::kResourceExhausted);
  next.ring_offset = 10 * 512;
  EXPECT_TRUE(Ingest(worker, next).ok());
  EXPECT_EQ(worker->told().credit_count, 0u);
  device_->stage.Open();
  EXPECT_TRUE(worker->Await([](const Told& told) { return told.credit_count == 2; }));
  EXPECT_TRUE(Ingest(worker, Range(worker, sequence, 20, 10, false)).ok());
}

TEST_F(CoreSequenceTest, LayersOfAPromptEndAtTheSamePosition) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  const auto range = [&](uint32_t layer, uint32_t position, uint32_t count, bool end) {
    IngestRequest request = Range(worker, sequence, position, count, end);
    request.layer_begin = layer;
    request.layer_count = 1;
    request.ring_offset = worker->next_key * 16384 % kRing;
    return IngestCode(worker, request);
  };
  EXPECT_EQ(range(0, 0, 60, false), StatusCode::kOk);
  // Layer 0 is beyond it already.
  EXPECT_EQ(range(1, 0, 40, true), StatusCode::kFailedPrecondition);
  EXPECT_EQ(range(1, 0, 60, true), StatusCode::kOk);
  EXPECT_EQ(range(0, 60, 1, true), StatusCode::kFailedPrecondition);
  EXPECT_EQ(range(1, 60, 1, false), StatusCode::kFailedPrecondition);  // layer 0 has not ended
  // So it can never end: the worker releases it.
  EXPECT_TRUE(*Release(worker, sequence));
}

TEST_F(CoreSequenceTest, AFailedCopyFailsTheSequenceAndReturnsTheCredit) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  Reply<PublishedInfo> waiting;
  core_->WaitPublished(worker->key, sequence, 100, waiting.done());
  device_->fail_stage = true;
  EXPECT_TRUE(Ingest(worker, Range(worker, sequence, 0, 40, false)).ok());
  EXPECT_TRUE(worker->Await([&](const Told& told) { return told.failed.contains(sequence); }));
  EXPECT_EQ(waiting.Get().status().code(), StatusCode::kInternal);
  EXPECT_EQ(worker->told().credit_count, 1u);
  EXPECT_EQ(IngestCode(worker, Range(worker, sequence, 40, 1, false)), StatusCode::kInternal);
  EXPECT_FALSE(Sequences()[0].failure.empty());
  EXPECT_TRUE(*Release(worker, sequence));
}

// --- Clustering and publishing ----------------------------------------------------------------

TEST_F(CoreSequenceTest, DirectPublishWaitsUntilTheWorkerHasMappedTheChunk) {
  StartCore();
  Worker worker = Attached();
  worker->maps_chunks = false;
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  Reply<PublishedInfo> waiting;
  MustIngest(worker, sequence, 0, 60, true);
  core_->WaitPublished(worker->key, sequence, 0, waiting.done());
  EXPECT_TRUE(AwaitStatus([this](const DaemonStatus& s) {
    core_->Tick();  // k-means alone is not news
    return s.clustering.problems == 4;
  }));
  // What is clustered and published after it passes it by.
  const SequenceId other = MustRegister(worker, FetchMode::kServed);
  MustIngest(worker, other, 0, 60, true);
  EXPECT_EQ(Wait(worker, other, 0)->segments, 2u);
  EXPECT_FALSE(waiting.ready());
  EXPECT_FALSE(worker->told().published.contains(sequence));
  for (const uint32_t chunk : worker->told().chunks) core_->ChunkMapped(worker->session, chunk);
  ASSERT_TRUE(waiting.Get().ok());
  EXPECT_EQ(waiting.Get()->segments, 2u);
  EXPECT_EQ(waiting.Get()->cut, 52u);
  EXPECT_EQ(worker->told().published.at(sequence).cut, 52u);
  EXPECT_EQ(core_->status().clustered_tokens, 2 * 48u);
  EXPECT_EQ(core_->status().published_segments, 4u);
}

TEST_F(CoreSequenceTest, ServedPublishNeedsNoMapping) {
  StartCore();
  Worker worker = Attached();
  worker->maps_chunks = false;
  const SequenceId sequence = MustRegister(worker, FetchMode::kServed);
  MustIngest(worker, sequence, 0, 60, true);
  EXPECT_EQ(Wait(worker, sequence, 0)->cut, 52u);
}

TEST_F(CoreSequenceTest, WaitEndsByPublishCancelReleaseOrSession) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  EXPECT_EQ(Wait(worker, sequence, 0).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(Wait(worker, sequence, 257).status().code(), StatusCode::kOutOfRange);
  Reply<PublishedInfo> prompt, decode, cancelled, ended;
  core_->WaitPublished(worker->key, sequence, 60, prompt.done());
  core_->WaitPublished(worker->key, sequence, 76, decode.done());
  const uint64_t id = core_->WaitPublished(worker->key, sequence, 200, cancelled.done());
  core_->WaitPublished(worker->key, sequence, 200, ended.done());
  core_->CancelWait(id);
  core_->CancelWait(id);
  core_->CancelWait(12345);
  EXPECT_EQ(cancelled.Get().status().code(), StatusCode::kCancelled);
  MustIngest(worker, sequence, 0, 60, true);
  EXPECT_EQ(prompt.Get()->cut, 52u);
  EXPECT_EQ(Wait(worker, sequence, 0)->cut, 52u);  // at once
  EXPECT_EQ(Wait(worker, sequence, 75)->segments, 2u);
  EXPECT_FALSE(decode.ready());
  MustIngest(worker, sequence, 60, 16, false);
  EXPECT_EQ(decode.Get()->cut, 68u);
  EXPECT_FALSE(ended.ready());
  EXPECT_TRUE(*Release(worker, sequence));
  EXPECT_EQ(ended.Get().status().code(), StatusCode::kNotFound);
}

TEST_F(CoreSequenceTest, WaitBeforeThePromptsEndIsForItsFullSegments) {
  StartCore();
  for (const FetchMode mode : {FetchMode::kDirect, FetchMode::kServed}) {
    Worker worker = Attached();
    const SequenceId sequence = MustRegister(worker, mode);
    EXPECT_EQ(Wait(worker, sequence, 43)->cut, 4u);  // nothing can be published of so few
    Reply<PublishedInfo> first, second, beyond;
    core_->WaitPublished(worker->key, sequence, 44, first.done());
    core_->WaitPublished(worker->key, sequence, 80, second.done());
    core_->WaitPublished(worker->key, sequence, 108, beyond.done());
    MustIngest(worker, sequence, 0, 43, false);
    Fence();
    EXPECT_FALSE(first.ready());  // the window behind the segment is not full
    MustIngest(worker, sequence, 43, 1, false);
    EXPECT_EQ(first.Get()->cut, 36u);
    EXPECT_FALSE(second.ready());
    MustIngest(worker, sequence, 44, 32, false);
    EXPECT_EQ(second.Get()->cut, 68u);  // though 76 tokens have come, not 80
    EXPECT_EQ(Wait(worker, sequence, 76)->cut, 68u);
    EXPECT_FALSE(beyond.ready());
    // A length that turns out to be beyond the end: tail and decode segments count.
    MustIngest(worker, sequence, 76, 14, true);
    EXPECT_GE(Wait(worker, sequence, 80)->segments, 2u);  // the tail may be there already
    EXPECT_EQ(Wait(worker, sequence, 0)->cut, 82u);
    if (mode == FetchMode::kDirect) {
      EXPECT_FALSE(beyond.ready());
      MustIngest(worker, sequence, 90, 16, false);
      EXPECT_EQ(beyond.Get()->cut, 98u);
    }
  }
}

TEST_F(CoreSequenceTest, WaitForAKnownEndIsOverOnceThePromptHasArrived) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kServed);
  device_->stage.Close();
  EXPECT_TRUE(Ingest(worker, Range(worker, sequence, 0, 10, true)).ok());
  Reply<PublishedInfo> waiting;
  core_->WaitPublished(worker->key, sequence, 10, waiting.done());
  EXPECT_EQ(Wait(worker, sequence, 9)->segments, 0u);
  EXPECT_FALSE(waiting.ready());  // no segment is to come, but a step may follow
  device_->stage.Open();
  EXPECT_EQ(waiting.Get()->segments, 0u);
  EXPECT_TRUE(DoFetch(worker, Fetch(sequence, 10, 0)).ok());
}

TEST_F(CoreSequenceTest, PublishesTheSegmentsOfThePlan) {
  const uint64_t seed = gpu::TestSeed();
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  StartCore();
  Worker worker = Attached();
  for (int round = 0; round < 30; ++round) {
    RegisterRequest request =
        Request(round % 2 == 0 ? FetchMode::kDirect : FetchMode::kServed, worker->next_key++);
    request.method.sink_tokens = static_cast<uint32_t>(random() % 20);
    request.method.min_window_tokens = static_cast<uint32_t>(random() % 20);
    request.method.prompt_segment_tokens = 1 + static_cast<uint32_t>(random() % 40);
    request.method.decode_segment_tokens = 1 + static_cast<uint32_t>(random() % 20);
    request.max_tokens = 160;
    const auto registered = Register(worker, request);
    ASSERT_TRUE(registered.ok()) << registered.status();
    const SequenceId sequence = registered->sequence;
    const auto prompt = static_cast<uint32_t>(1 + random() % 120);
    ASSERT_NO_FATAL_FAILURE(MustIngest(worker, sequence, 0, prompt, true));
    uint32_t length = prompt;
    if (request.mode == FetchMode::kDirect) {
      length += static_cast<uint32_t>(1 + random() % 40);
      ASSERT_NO_FATAL_FAILURE(MustIngest(worker, sequence, prompt, length - prompt, false));
    }
    const auto info = Wait(worker, sequence, length);
    ASSERT_TRUE(info.ok()) << info.status();
    const auto segments = gpu::AllSegments(request.method, prompt, length);
    ASSERT_EQ(info->segments, segments.size()) << "prompt " << prompt << " length " << length;
    ASSERT_EQ(info->cut, segments.empty() ? request.method.sink_tokens : segments.back().end);
    ASSERT_TRUE(*Release(worker, sequence));
  }
}

TEST_F(CoreSequenceTest, ReleaseWaitsForClusteringInFlight) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  device_->cluster.Close();
  MustIngest(worker, sequence, 0, 60, true);
  device_->cluster.AwaitArrival();
  Reply<bool> released;
  core_->ReleaseSequence(worker->key, sequence, released.done());
  EXPECT_EQ(IngestCode(worker, Range(worker, sequence, 60, 1, false)), StatusCode::kNotFound);
  EXPECT_FALSE(released.ready());
  EXPECT_GT(core_->status().host.used_bytes, 0u);  // k-means reads it
  device_->cluster.Open();
  EXPECT_TRUE(*released.Get());
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) {
    return s.sequences == 0 && s.host.free_bytes() == s.host.total_bytes &&
           s.gpu_used_bytes == kRing;
  }));
  EXPECT_TRUE(worker->told().published.empty());
}

TEST_F(CoreSequenceTest, SessionEndWaitsForWorkInFlight) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  const SequenceId other = MustRegister(worker, FetchMode::kServed);
  device_->cluster.Close();
  MustIngest(worker, sequence, 0, 60, true);
  device_->cluster.AwaitArrival();
  device_->stage.Close();
  EXPECT_TRUE(Ingest(worker, Range(worker, other, 0, 60, true)).ok());
  device_->stage.AwaitArrival();
  core_->WorkerDied(worker->session);
  Fence();
  EXPECT_EQ(core_->status().sequences, 2u);
  EXPECT_GT(core_->status().host.used_bytes, 0u);
  device_->stage.Open();
  Fence();
  device_->cluster.Open();
  EXPECT_TRUE(AwaitNothingHeld());
}

TEST_F(CoreSequenceTest, FailedClusteringFailsTheSequence) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  device_->fail_cluster = true;
  MustIngest(worker, sequence, 0, 60, true);
  EXPECT_TRUE(worker->Await([&](const Told& told) { return told.failed.contains(sequence); }));
  EXPECT_EQ(Wait(worker, sequence, 0).status().code(), StatusCode::kInternal);
  EXPECT_EQ(IngestCode(worker, Range(worker, sequence, 60, 1, false)), StatusCode::kInternal);
  device_->fail_cluster = false;
  EXPECT_TRUE(*Release(worker, sequence));
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) {
    return s.sequences == 0 && s.host.free_bytes() == s.host.total_bytes;
  }));
}

TEST_F(CoreSequenceTest, TooLittleDeviceMemoryForABatchFailsOnlyWhatCannotRunAlone) {
  StartCore();
  Worker worker = Attached();
  const SequenceId first = MustRegister(worker, FetchMode::kDirect);
  const SequenceId small = MustRegister(worker, FetchMode::kDirect);
  RegisterRequest request = Request(FetchMode::kDirect, worker->next_key++);
  request.method.prompt_segment_tokens = 128;
  const auto large = Register(worker, request);
  ASSERT_TRUE(large.ok()) << large.status();
  device_->cluster.Close();
  MustIngest(worker, first, 0, 60, true);
  device_->cluster.AwaitArrival();
  MustIngest(worker, small, 0, 60, true);
  MustIngest(worker, large->sequence, 0, 140, true);
  Fence();  // what is ready has been submitted: the next batch takes it all
  device_->largest_allocation = 32 * 256 + 1024;  // the workspace of a segment of `small`
  device_->cluster.Open();
  EXPECT_TRUE(
      worker->Await([&](const Told& told) { return told.failed.contains(large->sequence); }));
  EXPECT_EQ(worker->told().failed.at(large->sequence).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(Wait(worker, first, 0)->cut, 52u);
  EXPECT_EQ(Wait(worker, small, 0)->cut, 52u);
  EXPECT_EQ(worker->told().failed.size(), 1u);
}

TEST_F(CoreSequenceTest, FullPoolRefusesARangeAndTheSequenceGoesOn) {
  StartCore();
  Worker worker = Attached();
  RegisterRequest request = Request(FetchMode::kDirect, worker->next_key++);
  request.max_tokens = 100'000;
  request.reserve_tokens = 64;
  const auto registered = Register(worker, request);
  ASSERT_TRUE(registered.ok()) << registered.status();
  uint32_t position = 0;
  StatusCode code = StatusCode::kOk;
  while (code == StatusCode::kOk) {
    const size_t before = worker->told().credit_count;
    code = IngestCode(worker, Range(worker, registered->sequence, position, 500, false));
    if (code != StatusCode::kOk) break;
    ASSERT_TRUE(worker->Await([&](const Told& told) { return told.credit_count > before; }));
    position += 500;
  }
  EXPECT_EQ(code, StatusCode::kResourceExhausted);
  EXPECT_GT(position, 1000u);
  EXPECT_EQ(IngestCode(worker, Range(worker, registered->sequence, position, 500, false)),
            StatusCode::kResourceExhausted);
  MustIngest(worker, registered->sequence, position, 1, false);
  EXPECT_TRUE(*Release(worker, registered->sequence));
  EXPECT_TRUE(
      AwaitStatus([](const DaemonStatus& s) { return s.host.free_bytes() == s.host.total_bytes; }));
}

}  // namespace
}  // namespace clusterkv::service
