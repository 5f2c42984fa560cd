// Random work of workers that end at random points: afterwards nothing is held, every call is
// answered once, and no total has fallen.
#include <gtest/gtest.h>

#include <random>

#include "tests/gpu/seed.h"
#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

class CoreLifeTest : public CoreTest {
 protected:
  // What the test knows of a sequence that it asked for.
  struct Known {
    FetchMode mode = FetchMode::kDirect;
    Reply<RegisterReply> reply;
    uint32_t position = 0;
    bool prompt_ended = false;
    uint32_t layer = 0;
  };
  struct Actor {
    Worker worker;
    std::vector<Known> sequences;
    std::vector<uint64_t> waits;
  };

  uint32_t Below(uint32_t bound) { return static_cast<uint32_t>(random_() % bound); }

  template <typename T>
  Completion<T> Track(const char* call) {
    Reply<T> reply;
    calls_.push_back({call, [reply] { return reply.ready(); }});
    return reply.done();
  }

  void Step(Actor& actor) {
    const uint32_t action = Below(16);
    if (action < 3) return RegisterOne(actor);
    if (action == 3) {
      core_->AllocateArena(actor.worker->key, 1 + Below(100'000), Track<ArenaInfo>("arena"));
      return;
    }
    if (action == 4) return core_->Tick();
    if (action == 5) return device_->cluster.Open();
    if (actor.sequences.empty()) return;
    Known& known = actor.sequences[Below(static_cast<uint32_t>(actor.sequences.size()))];
    if (!known.reply.ready() && Below(4) == 0) return;
    if (!known.reply.Get().ok()) return;
    const SequenceId sequence = known.reply.Get()->sequence;
    if (action < 11) return IngestOne(actor, known, sequence);
    if (action == 11) {
      actor.waits.push_back(core_->WaitPublished(actor.worker->key, sequence, Below(260),
                                                 Track<PublishedInfo>("wait")));
      return;
    }
    if (action == 12 && !actor.waits.empty()) return core_->CancelWait(actor.waits.back());
    if (action == 13) {
      core_->ReleaseSequence(actor.worker->key, sequence, Track<bool>("release"));
      return;
    }
    if (known.mode != FetchMode::kServed || !known.prompt_ended) return;
    if (Below(2) == 0) {
      device_->cluster.Open();
      (void)Wait(actor.worker, sequence, 0);
    }
    core_->FetchClusters(actor.worker->key, Fetch(sequence, known.position, known.layer),
                         Track<std::vector<FetchResult>>("fetch"));
    if (Below(4) == 0) return;  // the next repeats it
    if (++known.layer == 2) {
      known.layer = 0;
      ++known.position;
    }
  }

  void RegisterOne(Actor& actor) {
    Known known;
    known.mode = Below(2) == 0 ? FetchMode::kDirect : FetchMode::kServed;
    RegisterRequest request = Request(known.mode, actor.worker->next_key++);
    request.method.min_window_tokens = Below(2) * Below(30);
    request.reserve_tokens = Below(2) * 64;
    core_->RegisterSequence(actor.worker->key, request, known.reply.done());
    const Reply<RegisterReply> reply = known.reply;
    calls_.push_back({"register", [reply] { return reply.ready(); }});
    actor.sequences.push_back(std::move(known));
  }

  void IngestOne(const Actor& actor, Known& known, SequenceId sequence) {
    const uint32_t count = 1 + Below(60);
    IngestRequest request =
        Range(actor.worker, sequence, known.position, count, !known.prompt_ended && Below(3) == 0);
    request.ring_offset = uint64_t{Below(32)} * 4096;
    if (!Ingest(actor.worker, request).ok()) return;
    known.position += count;
    known.prompt_ended |= request.end_of_prompt;
  }

  void End(const Actor& actor) {
    const SessionId session = actor.worker->session;
    const uint32_t how = Below(4);
    if (how == 0) core_->EndSession(session, absl::CancelledError("the stream broke"));
    if (how == 1) core_->Goodbye(session);
    if (how == 2 && Below(2) == 0) core_->EndSession(session, absl::OkStatus());
    // Calls that come too late are answered as well.
    for (const Known& known : actor.sequences) {
      if (!known.reply.ready() || !known.reply.Get().ok() || Below(2) == 0) continue;
      core_->ReleaseSequence(actor.worker->key, known.reply.Get()->sequence,
                             Track<bool>("late release"));
    }
    core_->AllocateArena(actor.worker->key, 1, Track<ArenaInfo>("late arena"));
    if (how != 1) core_->WorkerDied(session);
  }

  std::mt19937_64 random_;
  struct Call {
    const char* name;
    std::function<bool()> ready;
  };
  std::vector<Call> calls_;
};

TEST_F(CoreLifeTest, SessionsThatEndAtRandomPointsLeaveNothing) {
  const uint64_t seed = gpu::TestSeed();
  SCOPED_TRACE(gpu::SeedTrace(seed));
  random_.seed(seed);
  StartCore();
  DaemonStatus before = core_->status();
  for (int round = 0; round < 300; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    std::vector<Actor> actors(1 + Below(2));
    for (Actor& actor : actors) {
      actor.worker = Attached();
      actor.worker->maps_chunks = Below(4) != 0;
      actor.worker->unmaps_chunks = Below(4) != 0;
    }
    if (Below(3) == 0) device_->cluster.Close();
    device_->fail_cluster = Below(16) == 0;
    device_->fail_stage = Below(16) == 0;
    while (!actors.empty()) {
      const uint32_t actor = Below(static_cast<uint32_t>(actors.size()));
      if (Below(30) != 0) {
        Step(actors[actor]);
        continue;
      }
      End(actors[actor]);
      actors.erase(actors.begin() + actor);
    }
    device_->cluster.Open();
    ASSERT_TRUE(AwaitNothingHeld());
    Fence();
    for (const Call& call : calls_) ASSERT_TRUE(call.ready()) << call.name;
    calls_.clear();
    const DaemonStatus after = core_->status();
    ASSERT_GE(after.ingested_tokens, before.ingested_tokens);
    ASSERT_GE(after.clustered_tokens, before.clustered_tokens);
    ASSERT_GE(after.served.hit_clusters, before.served.hit_clusters);
    ASSERT_GE(after.sessions_ended_lost, before.sessions_ended_lost);
    before = after;
  }
  EXPECT_GT(before.published_segments, 0u);
  EXPECT_GT(before.served.hit_clusters + before.served.missed_clusters, 0u);
}

TEST_F(CoreLifeTest, StopWithWorkInFlightAnswersEveryCall) {
  const uint64_t seed = gpu::TestSeed() + 1;
  SCOPED_TRACE(gpu::SeedTrace(seed));
  random_.seed(seed);
  for (int round = 0; round < 20; ++round) {
    TemporaryPool pool(16, kChunk);
    auto host = gpu::CreateDevice({.backend = "host", .threads = 1});
    ASSERT_TRUE(host.ok()) << host.status();
    auto device = std::make_unique<GatedDevice>(*std::move(host));
    device_ = device.get();
    auto core = ServiceCore::Create({.version = "test", .boot_epoch = kEpoch}, std::move(device),
                                    pool.Take());
    ASSERT_TRUE(core.ok()) << core.status();
    core_ = *std::move(core);
    std::vector<Actor> actors(2);
    for (Actor& actor : actors) actor.worker = Attached();
    for (uint32_t step = Below(60); step > 0; --step) Step(actors[Below(2)]);
    core_->Stop();
    for (const Call& call : calls_) ASSERT_TRUE(call.ready()) << call.name;
    calls_.clear();
    EXPECT_EQ(core_->status().sequences, 0u);
    core_.reset();
  }
}

}  // namespace
}  // namespace clusterkv::service
