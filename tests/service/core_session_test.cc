// Sessions of a ServiceCore: opening, attaching, ending, draining, stopping.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "service/recent_errors.h"
#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

using absl::StatusCode;

class CoreSessionTest : public CoreTest {
 protected:
  StatusCode OpenWith(HelloInfo hello) {
    Reply<WelcomeInfo> reply;
    core_->OpenSession(std::move(hello), std::make_shared<FakeWorker>(*core_), reply.done());
    return reply.Get().status().code();
  }
  void End(const Worker& worker, const absl::Status& why) {
    core_->EndSession(worker->session, why);
  }
};

TEST_F(CoreSessionTest, OpensAttachesAndEnds) {
  StartCore();
  Worker worker = Open();
  EXPECT_EQ(worker->key.token.size(), 16u);
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) {
    return s.sessions.size() == 1 && !s.sessions[0].attached && s.sessions_started == 1;
  }));
  EXPECT_EQ(*Attach(worker, worker->key), worker->session);
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) {
    return s.sessions.size() == 1 && s.sessions[0].attached && s.sessions[0].uid == 2;
  }));
  End(worker, absl::OkStatus());
  End(worker, absl::AbortedError("again"));
  EXPECT_TRUE(worker->Await([](const Told& told) { return told.session_ended > 0; }));
  EXPECT_TRUE(AwaitNothingHeld());
  EXPECT_EQ(worker->told().session_ended, 1u);
  ASSERT_EQ(worker->told().ended.size(), 1u);
  EXPECT_TRUE(worker->told().ended[0].ok());
  EXPECT_EQ(core_->status().sessions_ended_lost, 0u);
}

TEST_F(CoreSessionTest, RefusesAHelloItCannotServe) {
  StartCore();
  HelloInfo hello = Hello();
  hello.protocol_version_min = 2;
  hello.protocol_version_max = 9;
  EXPECT_EQ(OpenWith(hello), StatusCode::kFailedPrecondition);
  hello = Hello();
  hello.state_layout_versions = {};
  EXPECT_EQ(OpenWith(hello), StatusCode::kFailedPrecondition);
  hello.state_layout_versions = {gpu::kStateLayoutVersion + 1};
  EXPECT_EQ(OpenWith(hello), StatusCode::kFailedPrecondition);
  hello.state_layout_versions.assign(100'000, gpu::kStateLayoutVersion);
  EXPECT_EQ(OpenWith(hello), StatusCode::kInvalidArgument);
  hello = Hello();
  hello.client_name.assign(129, 'x');
  EXPECT_EQ(OpenWith(hello), StatusCode::kInvalidArgument);
  hello = Hello();
  hello.group = SessionGroup{.id = "tp", .rank = 2, .world_size = 2};
  EXPECT_EQ(OpenWith(hello), StatusCode::kInvalidArgument);
  hello.group = SessionGroup{.id = "tp", .rank = 0, .world_size = 0};
  EXPECT_EQ(OpenWith(hello), StatusCode::kInvalidArgument);
  EXPECT_EQ(core_->status().sessions_started, 0u);
}

TEST_F(CoreSessionTest, BoundsTheSessionsThatAreOpen) {
  StartCore({.version = "test", .max_sessions = 2});
  Worker first = Open();
  Worker second = Open();
  EXPECT_EQ(OpenWith(Hello()), StatusCode::kResourceExhausted);
  End(first, absl::OkStatus());
  EXPECT_EQ(OpenWith(Hello()), StatusCode::kOk);
}

TEST_F(CoreSessionTest, ChecksEpochAndTokenBeforeAllElse) {
  StartCore();
  Worker worker = Open();
  EXPECT_EQ(Attach(worker, {worker->key.token, kEpoch + 1}).status().code(),
            StatusCode::kFailedPrecondition);
  EXPECT_EQ(Attach(worker, {std::string(16, 'x'), kEpoch}).status().code(),
            StatusCode::kUnauthenticated);
  EXPECT_EQ(Attach(worker, {"", kEpoch}).status().code(), StatusCode::kUnauthenticated);
  EXPECT_EQ(AllocateArena(worker, 1).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Attach(worker, worker->key).ok());
  EXPECT_EQ(Attach(worker, worker->key).status().code(), StatusCode::kAlreadyExists);
  EXPECT_TRUE(AllocateArena(worker, 1).ok());
  End(worker, absl::OkStatus());
  EXPECT_EQ(AllocateArena(worker, 1).status().code(), StatusCode::kUnauthenticated);
  EXPECT_EQ(Attach(worker, worker->key).status().code(), StatusCode::kUnauthenticated);
}

TEST_F(CoreSessionTest, EndsASessionThatDoesNotAttachInTime) {
  StartCore({.version = "test", .attach_timeout = absl::Seconds(10)});
  Worker late = Open();
  Worker attached = Attached();
  Advance(absl::Seconds(10));
  core_->Tick();
  Fence();
  EXPECT_TRUE(late->told().ended.empty());
  Advance(absl::Nanoseconds(1));
  core_->Tick();
  Fence();
  ASSERT_EQ(late->told().ended.size(), 1u);
  EXPECT_EQ(late->told().ended[0].code(), StatusCode::kAborted);
  EXPECT_TRUE(attached->told().ended.empty());
  EXPECT_EQ(core_->status().sessions_ended_lost, 1u);
}

TEST_F(CoreSessionTest, AnyOrderOfEndsFreesAll) {
  StartCore();
  enum Call { kEnd, kGoodbye, kDied };
  const std::vector<std::vector<Call>> orders = {
      {kEnd, kDied}, {kEnd, kGoodbye},   {kDied}, {kGoodbye}, {kGoodbye, kDied, kEnd},
      {kDied, kEnd}, {kEnd, kEnd, kDied}};
  for (const auto& order : orders) {
    Worker worker = Attached();
    worker->unmaps_chunks = false;
    const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
    MustIngest(worker, sequence, 0, 60, true);
    for (const Call call : order) {
      if (call == kEnd) End(worker, absl::OkStatus());
      if (call == kGoodbye) core_->Goodbye(worker->session);
      if (call == kDied) core_->WorkerDied(worker->session);
    }
    EXPECT_TRUE(AwaitNothingHeld());
    EXPECT_EQ(worker->told().ended.size(), 1u);
    EXPECT_EQ(worker->told().session_ended, 1u);
  }
}

TEST_F(CoreSessionTest, MemoryIsQuarantinedUntilTheWorkerIsGone) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  MustIngest(worker, sequence, 0, 60, true);
  End(worker, absl::OkStatus());
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) {
    return s.sessions.empty() && s.sequences == 0 && s.gpu_used_bytes == 0 &&
           s.host.used_bytes == 0 && s.host.reserved_bytes == 0 && s.host.quarantined_bytes > 0;
  }));
  // Of one that is over its word no longer counts.
  for (const uint32_t chunk : worker->told().chunks) {
    core_->ChunkUnmapped(worker->session, chunk);
  }
  Fence();
  EXPECT_GT(core_->status().host.quarantined_bytes, 0u);
  core_->WorkerDied(worker->session);
  EXPECT_TRUE(AwaitNothingHeld());
}

TEST_F(CoreSessionTest, AWorkerThatLiesAboutItsMappingsLosesItsSession) {
  StartCore();
  Worker honest = Attached();
  Worker invents = Attached();
  core_->ChunkMapped(invents->session, 3);
  EXPECT_TRUE(invents->Await([](const Told& told) { return told.ended.size() == 1; }));
  Worker drops = Attached();
  const SequenceId sequence = MustRegister(drops, FetchMode::kDirect);
  MustIngest(drops, sequence, 0, 60, true);
  core_->ChunkUnmapped(drops->session, 0);  // in use
  EXPECT_TRUE(drops->Await([](const Told& told) { return told.ended.size() == 1; }));
  EXPECT_EQ(drops->told().ended[0].code(), StatusCode::kAborted);
  EXPECT_TRUE(honest->told().ended.empty());
  core_->ChunkMapped(999, 0);  // of nobody
  core_->WorkerDied(999);
  core_->Goodbye(999);
  core_->EndSession(999, absl::OkStatus());
  Fence();
}

TEST_F(CoreSessionTest, DrainTellsSessionsAndRefusesNewWork) {
  StartCore();
  Worker worker = Attached();
  std::promise<void> idle;
  core_->Drain(absl::Seconds(5), [&idle] { idle.set_value(); });
  EXPECT_TRUE(worker->Await([](const Told& told) { return told.draining == 1; }));
  EXPECT_FALSE(core_->status().ready);
  EXPECT_EQ(OpenWith(Hello()), StatusCode::kUnavailable);
  EXPECT_EQ(AllocateArena(worker, 1).status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(Register(worker, Request(FetchMode::kDirect, 1)).status().code(),
            StatusCode::kUnavailable);
  auto done = idle.get_future();
  EXPECT_NE(done.wait_for(std::chrono::seconds(0)), std::future_status::ready);
  End(worker, absl::OkStatus());
  EXPECT_EQ(done.wait_for(std::chrono::seconds(60)), std::future_status::ready);
}

TEST_F(CoreSessionTest, DrainIsOverWithTheLastSessionThoughItsMemoryIsQuarantined) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  MustIngest(worker, sequence, 0, 60, true);
  std::promise<void> idle;
  core_->Drain(absl::Seconds(5), [&idle] { idle.set_value(); });
  End(worker, absl::OkStatus());
  EXPECT_EQ(idle.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
  EXPECT_GT(core_->status().host.quarantined_bytes, 0u);
}

TEST_F(CoreSessionTest, DrainWithoutSessionsIsOverAtOnce) {
  StartCore();
  std::promise<void> idle;
  core_->Drain(absl::Seconds(5), [&idle] { idle.set_value(); });
  EXPECT_EQ(idle.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
}

TEST_F(CoreSessionTest, StopAnswersEveryCall) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kServed);
  MustIngest(worker, sequence, 0, 60, true);
  ASSERT_TRUE(Wait(worker, sequence, 0).ok());
  // The core's thread is held up, so that all of this still lies in its queue when Stop comes.
  std::promise<void> entered, go;
  core_->ListSequences(std::nullopt, [&](absl::StatusOr<std::vector<SequenceStatus>>) {
    entered.set_value();
    go.get_future().wait();
  });
  entered.get_future().wait();
  for (int i = 0; i < 20'000; ++i) {  // what Stop overtakes if it does not wait
    core_->ListSequences(std::nullopt, [](absl::StatusOr<std::vector<SequenceStatus>>) {});
  }
  Reply<std::vector<FetchResult>> fetched;
  core_->FetchClusters(worker->key, Fetch(sequence, 60, 0), fetched.done());
  Reply<PublishedInfo> waited;
  core_->WaitPublished(worker->key, sequence, 200, waited.done());
  std::vector<Reply<RegisterReply>> registered(20);
  std::vector<Reply<ArenaInfo>> arenas(20);
  for (size_t i = 0; i < registered.size(); ++i) {
    core_->RegisterSequence(worker->key, Request(FetchMode::kDirect, 100 + i),
                            registered[i].done());
    core_->AllocateArena(worker->key, 4096, arenas[i].done());
  }
  std::thread stopper([this] { core_->Stop(); });
  go.set_value();
  stopper.join();
  EXPECT_TRUE(fetched.ready());
  EXPECT_TRUE(waited.ready());
  for (size_t i = 0; i < registered.size(); ++i) {
    EXPECT_TRUE(registered[i].ready()) << i;
    EXPECT_TRUE(arenas[i].ready()) << i;
  }
  EXPECT_EQ(core_->status().sequences, 0u);
  EXPECT_EQ(core_->status().gpu_used_bytes, 0u);
  EXPECT_EQ(AllocateArena(worker, 4096).status().code(), StatusCode::kResourceExhausted);
  core_->Stop();  // once more does nothing
}

TEST_F(CoreSessionTest, DeviceThatDoesNotAnswerMakesTheDaemonUnready) {
  StartCore();
  const Worker worker = Attached();
  EXPECT_TRUE(core_->status().ready);
  device_->shared.Close();  // the memory thread wedges in an allocation
  Reply<ArenaInfo> arena;
  core_->AllocateArena(worker->key, 4096, arena.done());
  device_->shared.AwaitArrival();
  core_->Tick();
  Advance(absl::Seconds(9));
  core_->Tick();
  Fence();
  EXPECT_TRUE(core_->status().ready) << "it may be busy";
  Advance(absl::Seconds(2));
  core_->Tick();
  Fence();
  EXPECT_FALSE(core_->status().ready);
  EXPECT_EQ(core_->status().not_ready_reason, "the device has not answered for 11 s");
  EXPECT_EQ(core_->status().device_age_seconds, 11.0);
  device_->shared.Open();
  EXPECT_TRUE(arena.Get().ok());
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& status) { return status.ready; }));
}

class CoreNewFilesTest : public CoreTest {
 protected:
  CoreNewFilesTest() : CoreTest(32, /*new_files=*/true) {}
};

TEST_F(CoreNewFilesTest, AChunkThatCannotBeCleanedIsTriedAgainEachTick) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kDirect);
  MustIngest(worker, sequence, 0, 60, true);
  {
    const FileSizeLimit limit(kChunk / 2);
    core_->Goodbye(worker->session);
    const auto warned = [] {
      return std::ranges::any_of(DaemonErrors().List(), [](const RecentError& error) {
        return error.text.find("stays in quarantine") != std::string::npos;
      });
    };
    EXPECT_TRUE(AwaitStatus([&](const DaemonStatus& s) {
      return warned() && s.sessions.empty() && s.host.quarantined_bytes > 0;
    }));
  }
  EXPECT_TRUE(AwaitStatus([&](const DaemonStatus& s) {
    core_->Tick();
    return s.host.quarantined_bytes == 0 && s.host.used_bytes == 0;
  }));
  worker = Attached();
  MustIngest(worker, MustRegister(worker, FetchMode::kDirect), 0, 60, true);
}

}  // namespace
}  // namespace clusterkv::service
