// What a ServiceCore counts and tells of itself.
#include <gtest/gtest.h>

#include <future>

#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

class CoreStatusTest : public CoreTest {
 protected:
  static uint64_t Ended(const DaemonStatus& status, SessionEnd reason) {
    return status.sessions_ended[static_cast<size_t>(reason)];
  }
  static uint64_t Refused(const DaemonStatus& status, Limit limit) {
    return status.refused[static_cast<size_t>(limit)];
  }
  // Ticks until what they sample is as wanted.
  testing::AssertionResult AwaitSample(const std::function<bool(const DaemonStatus&)>& condition) {
    return AwaitStatus([&](const DaemonStatus& status) {
      if (condition(status)) return true;
      core_->Tick();
      return false;
    });
  }
  // A published prompt of 200 tokens and a cache of 64 tokens a layer, which holds a few clusters.
  SequenceId SmallCache(const Worker& worker) {
    RegisterRequest request = Request(FetchMode::kServed, worker->next_key++);
    request.method.cache_tokens = 64;
    const auto reply = Register(worker, request);
    EXPECT_TRUE(reply.ok()) << reply.status();
    MustIngest(worker, reply->sequence, 0, 200, true);
    EXPECT_TRUE(Wait(worker, reply->sequence, 0).ok());
    return reply->sequence;
  }
};

TEST_F(CoreStatusTest, SessionsThatEndedAddUpByReason) {
  StartCore();
  const auto end = [&](SessionEnd reason, const std::function<void(const Worker&)>& how) {
    const uint64_t before = Ended(core_->status(), reason);
    const Worker worker = Attached();
    how(worker);
    EXPECT_TRUE(AwaitStatus([&](const DaemonStatus& status) {
      return Ended(status, reason) == before + 1;
    })) << kSessionEndNames[static_cast<size_t>(reason)];
    core_->WorkerDied(worker->session);
  };
  end(SessionEnd::kClosed, [&](const Worker& worker) { core_->Goodbye(worker->session); });
  end(SessionEnd::kClosed,
      [&](const Worker& worker) { core_->EndSession(worker->session, absl::OkStatus()); });
  end(SessionEnd::kConnectionLost, [&](const Worker& worker) {
    core_->EndSession(worker->session, absl::AbortedError("broken"));
  });
  end(SessionEnd::kWorkerDied, [&](const Worker& worker) { core_->WorkerDied(worker->session); });
  end(SessionEnd::kProtocolError,
      [&](const Worker& worker) { core_->ChunkMapped(worker->session, 99); });
  const Worker silent = Open();
  Advance(absl::Seconds(11));
  core_->Tick();
  EXPECT_TRUE(AwaitStatus(
      [&](const DaemonStatus& status) { return Ended(status, SessionEnd::kAttachTimeout) == 1; }));
  const Worker left = Open();
  core_->EndAllSessions();
  Fence();
  const DaemonStatus status = core_->status();
  EXPECT_EQ(Ended(status, SessionEnd::kDaemonStopped), 1u);
  EXPECT_EQ(status.sessions_started, 7u);
  EXPECT_EQ(status.sessions_ended_lost, 5u);
  EXPECT_EQ(status.sessions.size(), 0u);
}

TEST_F(CoreStatusTest, CountsWhatIsRefusedByWhatThereIsTooLittleOf) {
  CoreOptions options;
  options.gpu_memory_bytes = 64 << 20;
  options.max_sessions = 2;
  options.max_sequences_per_session = 1;
  StartCore(options);
  const Worker worker = Attached();
  const Worker other = Attached();
  Reply<WelcomeInfo> third;
  core_->OpenSession(Hello(), worker, third.done());
  EXPECT_FALSE(third.Get().ok());
  EXPECT_FALSE(AllocateArena(worker, 1 << 30).ok());
  MustRegister(worker, FetchMode::kDirect);
  EXPECT_FALSE(Register(worker, Request(FetchMode::kDirect, worker->next_key++)).ok());
  RegisterRequest huge = Request(FetchMode::kServed, other->next_key++);
  huge.max_tokens = 16'000;  // more than the pool has
  EXPECT_FALSE(Register(other, huge).ok());
  Fence();
  core_->Tick();
  Fence();
  const DaemonStatus status = core_->status();
  EXPECT_EQ(Refused(status, Limit::kSessions), 1u);
  EXPECT_EQ(Refused(status, Limit::kGpuMemory), 1u);
  EXPECT_EQ(Refused(status, Limit::kSequences), 1u);
  EXPECT_EQ(Refused(status, Limit::kHostMemory), 1u);
  EXPECT_EQ(Refused(status, Limit::kArenas), 0u);
}

TEST_F(CoreStatusTest, RingsAreUsedUntilTheirCreditsReturn) {
  StartCore();
  const Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  device_->stage.Close();
  const IngestRequest range = Range(worker, sequence, 0, 40, false);
  ASSERT_TRUE(Ingest(worker, range).ok());
  device_->stage.AwaitArrival();
  EXPECT_FALSE(Ingest(worker, Range(worker, sequence, 40, 1, false)).ok()) << "touches the first";
  core_->Tick();
  Fence();
  const uint64_t bytes = uint64_t{40} * 2 * 64 * 2 * 2;  // tokens, K and V, head dim, fp16, layers
  DaemonStatus status = core_->status();
  EXPECT_EQ(status.ingest.ranges_in_flight, 1u);
  EXPECT_EQ(status.ingest.ring_used_bytes, bytes);
  EXPECT_EQ(status.ingest.ring_bytes, kRing);
  EXPECT_EQ(Refused(status, Limit::kRingCredits), 1u);
  EXPECT_EQ(status.ingest.bytes, 0u);
  Advance(absl::Milliseconds(30));
  device_->stage.Open();
  ASSERT_TRUE(AwaitStatus([](const DaemonStatus& s) { return s.ingest.ranges_in_flight == 0; }));
  status = core_->status();
  EXPECT_EQ(status.ingest.ring_used_bytes, 0u);
  EXPECT_EQ(status.ingest.bytes, bytes);
  EXPECT_EQ(status.d2h.bytes, bytes);
  EXPECT_NEAR(status.ingest.range.sum(), 0.03, 1e-9);
}

TEST_F(CoreStatusTest, ClusteringIsCountedAndPendingSegmentsComeAndGo) {
  StartCore();
  const Worker worker = Attached();
  RegisterRequest request = Request(FetchMode::kServed, 1);
  request.method.kmeans_iterations = 1000;
  const auto registered = Register(worker, request);
  ASSERT_TRUE(registered.ok()) << registered.status();
  const SequenceId sequence = registered->sequence;
  device_->cluster.Close();
  MustIngest(worker, sequence, 0, 60, true);  // segments of 32 and 16 tokens, two layers
  device_->cluster.AwaitArrival();
  ASSERT_TRUE(
      AwaitStatus([](const DaemonStatus& s) { return s.clustering.pending_segments == 2; }));
  DaemonStatus status = core_->status();
  EXPECT_GT(status.clustering.running_jobs, 0u);
  EXPECT_EQ(status.clustering.running_jobs + status.clustering.waiting_jobs, 4u);
  EXPECT_GT(status.clustering.oldest_job_seconds, 0);
  EXPECT_EQ(status.clustering.publish.sum(), 0);
  Advance(absl::Seconds(2));
  device_->cluster.Open();
  ASSERT_TRUE(Wait(worker, sequence, 0).ok());
  ASSERT_TRUE(AwaitStatus([](const DaemonStatus& s) {
    return s.clustering.pending_segments == 0 && s.clustering.running_jobs == 0;
  }));
  status = core_->status();
  EXPECT_EQ(status.clustering.problems, 4u);
  EXPECT_EQ(status.clustering.tokens, 2u * (32 + 16));
  EXPECT_GE(status.clustering.iterations, 4u);
  EXPECT_LT(status.clustering.iterations, 4u * 1000) << "those done, not those allowed";
  EXPECT_GE(status.clustering.clusters, 4u * 2);
  EXPECT_GE(status.clustering.batches, 1u);
  EXPECT_NEAR(status.clustering.publish.sum(), 2 * 2, 1e-9);
  EXPECT_GT(status.d2h.seconds, 0);
}

TEST_F(CoreStatusTest, WhatMissedIsCachedOrEvicted) {
  StartCore();
  const Worker worker = Attached();
  const SequenceId sequence = SmallCache(worker);
  constexpr uint64_t kRow = 2 * 64 * 2;
  EXPECT_EQ(core_->status().served_fill.capacity_bytes, 2 * 64 * kRow);
  for (uint32_t position = 200; position < 230; ++position) {
    for (uint32_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(DoFetch(worker, Fetch(sequence, position, layer)).ok()) << position;
    }
  }
  ASSERT_TRUE(AwaitSample(
      [](const DaemonStatus& status) { return status.served_sequences.decode_steps == 30; }));
  DaemonStatus status = core_->status();
  EXPECT_GT(status.served.missed_tokens, 2u * 64) << "more than the cache holds";
  EXPECT_GT(status.served.evicted_tokens, 0u);
  EXPECT_GT(status.served_fill.used_bytes, 0u);
  EXPECT_LE(status.served_fill.used_bytes, status.served_fill.capacity_bytes);
  EXPECT_EQ(status.served.evicted_tokens + status.served_fill.used_bytes / kRow,
            status.served.missed_tokens);
  EXPECT_EQ(status.served.evicted_bytes, status.served.evicted_tokens * kRow);
  ASSERT_EQ(status.served.layers.size(), 2u);
  EXPECT_EQ(status.served.layers[0].hit_clusters + status.served.layers[1].hit_clusters,
            status.served.hit_clusters);
  EXPECT_EQ(status.served.layers[0].missed_clusters + status.served.layers[1].missed_clusters,
            status.served.missed_clusters);
  EXPECT_TRUE(status.direct.layers.empty());

  // The calls' own times.
  const FetchStatus& fetch = status.fetch;
  EXPECT_EQ(fetch.sequences, 60u);
  EXPECT_EQ(fetch.phases[static_cast<size_t>(FetchPhase::kQueue)].count, 60u);
  EXPECT_EQ(fetch.phases[static_cast<size_t>(FetchPhase::kGather)].count, 1u) << "one in 64";
  double phases = 0;
  for (const Mean& phase : fetch.phases) phases += phase.sum;
  EXPECT_LE(phases, fetch.call.sum());
  EXPECT_GT(status.h2d.bytes, 0u) << "the first call finds nothing in the cache";

  const uint64_t evicted = status.served.evicted_tokens;
  ASSERT_TRUE(Release(worker, sequence).ok());
  status = core_->status();
  EXPECT_EQ(status.served_fill.used_bytes, 0u);
  EXPECT_EQ(status.served_fill.capacity_bytes, 0u);
  EXPECT_EQ(status.served.evicted_tokens, evicted);
  EXPECT_EQ(status.served_sequences.registered, 1u);
  EXPECT_EQ(status.served_sequences.released, 1u);
}

TEST_F(CoreStatusTest, ADamagedCacheOfAWorkerIsIgnored) {
  StartCore();
  const Worker worker = Attached();
  const RegisterRequest request = Request(FetchMode::kDirect, worker->next_key++);
  const auto reply = Register(worker, request);
  ASSERT_TRUE(reply.ok());
  const auto layout = gpu::StateLayout::Create(
      request.shape, request.method.Resolved(request.shape), request.max_tokens);
  std::byte* const state = worker->arena_data(reply->state_arena);
  uint32_t* const free_count = gpu::At<uint32_t>(state, layout->free_count);
  free_count[1] -= 10;
  gpu::At<gpu::StepLatch>(state, layout->latch)->step = 3;
  constexpr uint64_t kRow = 2 * 64 * 2;
  ASSERT_TRUE(
      AwaitSample([](const DaemonStatus& s) { return s.direct_fill.used_bytes == 10 * kRow; }));
  EXPECT_EQ(core_->status().direct_sequences.decode_steps, 3u);
  free_count[1] = 1'000'000;
  gpu::At<gpu::StepLatch>(state, layout->latch)->step = 1;
  ASSERT_TRUE(AwaitSample([](const DaemonStatus& s) { return s.ignored_samples >= 2; }));
  EXPECT_EQ(core_->status().direct_fill.used_bytes, 10 * kRow);
  EXPECT_EQ(core_->status().direct_sequences.decode_steps, 3u);
  EXPECT_EQ(core_->status().direct.evicted_tokens, 0u);
}

TEST_F(CoreStatusTest, FailedSequencesAreCountedOnce) {
  StartCore();
  const Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  device_->fail_stage = true;
  MustIngest(worker, sequence, 0, 8, false);
  ASSERT_TRUE(AwaitSample([](const DaemonStatus& s) { return s.direct_sequences.failed == 1; }));
  EXPECT_EQ(core_->status().served_sequences.failed, 0u);
}

TEST_F(CoreStatusTest, TellsHowMuchOfTheHostMemoryIsFilled) {
  StartCore();
  EXPECT_EQ(core_->status().largest_free_extent_bytes, kChunk);
  EXPECT_EQ(core_->status().host.pinned_bytes, 0u) << "the host backend pins nothing";
  EXPECT_EQ(core_->status().host.chunk_bytes, kChunk);
  const Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  MustIngest(worker, sequence, 0, 60, true);
  core_->Tick();
  ASSERT_TRUE(AwaitStatus([](const DaemonStatus& s) { return s.host_extent_bytes > 0; }));
  const DaemonStatus status = core_->status();
  EXPECT_GE(status.host_extent_bytes, uint64_t{56} * 2 * 256);  // all but the sinks, two layers
  EXPECT_LE(status.host_extent_bytes, status.host.used_bytes);
}

TEST_F(CoreStatusTest, AStuckThreadIsSeenFromOutside) {
  StartCore();
  const Worker worker = Attached();
  const auto thread = [&](const std::string& name) {
    for (const ThreadStatus& status : core_->status().threads) {
      if (status.name == name) return status;
    }
    ADD_FAILURE() << "no thread " << name;
    return ThreadStatus();
  };
  device_->shared.Close();
  Reply<ArenaInfo> arena;
  core_->AllocateArena(worker->key, 4096, arena.done());
  device_->shared.AwaitArrival();
  core_->Tick();  // its probe waits behind
  Fence();
  const double busy = thread("memory").busy_seconds;
  EXPECT_GT(thread("memory").task_age_seconds, 0);
  EXPECT_GT(thread("memory").busy_seconds, busy);
  EXPECT_GE(thread("memory").waiting, 1u);
  EXPECT_EQ(thread("serve").task_age_seconds, 0);
  device_->shared.Open();
  EXPECT_TRUE(arena.Get().ok());
}

TEST_F(CoreStatusTest, AStuckCoreMakesTheDaemonUnready) {
  StartCore();
  core_->Tick();
  Fence();
  std::promise<void> reached, go_on;
  core_->ListSequences(std::nullopt, [&](const absl::StatusOr<std::vector<SequenceStatus>>&) {
    reached.set_value();
    go_on.get_future().wait();
  });
  reached.get_future().wait();
  Advance(absl::Seconds(9));
  EXPECT_TRUE(core_->status().ready);
  EXPECT_EQ(core_->status().tick_age_seconds, 9.0);
  Advance(absl::Seconds(2));
  EXPECT_FALSE(core_->status().ready);
  EXPECT_EQ(core_->status().not_ready_reason, "the core has not run for 11 s");
  EXPECT_EQ(core_->status().device_age_seconds, 11.0);
  go_on.set_value();
  core_->Tick();
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& status) { return status.ready; }));
  EXPECT_EQ(core_->status().tick_age_seconds, 0.0);
}

}  // namespace
}  // namespace clusterkv::service
