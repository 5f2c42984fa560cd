// Audits of decode steps, as a worker asks for them: a slot of its ring, written by hand.
#include <gmock/gmock.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gpu/audit_layout.h"
#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kNotFound = absl::StatusCode::kNotFound;

class CoreAuditTest : public CoreTest {
 protected:
  static constexpr uint64_t kSlotOffset = 128 << 10;  // in the ring, behind what is ingested
  static constexpr uint32_t kLayer = 1;

  // A direct sequence with two published segments, [4, 36) and [36, 52), and an honest slot.
  void StartAudited() {
    CoreOptions options;
    options.audit_share = 0.5;
    StartCore(options);
    worker_ = Attached();
    const RegisterRequest request = Request(FetchMode::kDirect, worker_->next_key++);
    layout_ = *gpu::StateLayout::Create(request.shape, request.method.Resolved(request.shape),
                                        request.max_tokens);
    const auto reply = Register(worker_, request);
    ASSERT_TRUE(reply.ok()) << reply.status();
    sequence_ = reply->sequence;
    state_arena_ = reply->state_arena;
    MustIngest(worker_, sequence_, 0, 60, true);
    ASSERT_EQ(Wait(worker_, sequence_, 0)->cut, 52u);
    WriteSlot();
  }

  std::byte* state() const { return worker_->arena_data(state_arena_); }
  gpu::ClusterEntry* entries() const {
    return gpu::At<gpu::ClusterEntry>(state(), layout_.clusters) +
           layout_.head_index(kLayer, 0) * layout_.max_clusters;
  }
  // Clusters of the first `segments` segments.
  uint32_t clusters(uint32_t segments) const {
    const auto* runs = gpu::At<gpu::SegmentRun>(state(), layout_.segment_runs) +
                       layout_.head_index(kLayer, 0) * layout_.max_segments;
    return runs[segments - 1].cluster_end;
  }

  // Queries and log-sum-exps 0; of the first and the last cluster a token each.
  void WriteSlot() {
    std::memset(worker_->arena_data(worker_->ring) + kSlotOffset, 0, audit().bytes);
    *Word(audit().cut) = 52;
    *Word(audit().counts) = 2;
    Word(audit().clusters)[0] = 0;
    Word(audit().clusters)[1] = clusters(2) - 1;
    Word(audit().takes)[0] = Word(audit().takes)[1] = 1;
  }
  uint32_t* Word(uint64_t offset) const {
    return gpu::At<uint32_t>(worker_->arena_data(worker_->ring) + kSlotOffset, offset);
  }

  gpu::AuditLayout audit() const { return gpu::AuditLayout(layout_); }
  AuditRequest Honest() const {
    return {.sequence = sequence_,
            .layer = kLayer,
            .slot = {.inline_bytes = {},
                     .arena = worker_->ring,
                     .offset = kSlotOffset,
                     .bytes = audit().bytes}};
  }
  absl::StatusOr<bool> Audit(const AuditRequest& request) {
    Advance(absl::Minutes(1));  // past the pause of the one before
    return AuditNow(request);
  }
  absl::StatusOr<bool> AuditNow(const AuditRequest& request) {
    Reply<bool> reply;
    core_->AuditDecodeStep(worker_->key, request, reply.done());
    return reply.Get();
  }

  Worker worker_;
  gpu::StateLayout layout_ = {};
  SequenceId sequence_ = 0;
  ArenaId state_arena_ = 0;
};

TEST_F(CoreAuditTest, AuditsPauseToKeepToTheirShare) {
  StartAudited();
  EXPECT_TRUE(*AuditNow(Honest()));
  EXPECT_FALSE(*AuditNow(Honest())) << "the clock stands still: its pause is not over";
  Advance(absl::Minutes(1));
  EXPECT_TRUE(*AuditNow(Honest()));
  Fence();
  core_->Tick();
  Fence();
  const AuditStatus status = core_->status().audit;
  EXPECT_EQ(status.steps, 2u);
  EXPECT_EQ(status.skipped, 1u);
  EXPECT_EQ(status.recall_heads, 4u);
  // Every score is 0: of 48 candidates, 46 were not chosen, and what was attended weighs 1.
  EXPECT_NEAR(status.missed_mass_sum, 4 * 46.0 / 47, 1e-6);
  EXPECT_GT(status.seconds, 0);
  EXPECT_TRUE(*Release(worker_, sequence_));
}

TEST_F(CoreAuditTest, AStepMayHaveSeenLess) {
  StartAudited();
  *Word(audit().cut) = 36;
  EXPECT_EQ(Audit(Honest()).status().code(), kInvalid) << "the last cluster is not before that";
  Word(audit().clusters)[1] = clusters(1) - 1;
  EXPECT_TRUE(*Audit(Honest()));
  // 32 candidates.
  EXPECT_NEAR(core_->status().audit.missed_mass_sum, 2 * 30.0 / 31, 1e-6);
  *Word(audit().cut) = 4;
  *Word(audit().counts) = 0;
  EXPECT_TRUE(*Audit(Honest())) << "nothing was published";
  EXPECT_NEAR(core_->status().audit.missed_mass_sum, 2 * 30.0 / 31, 1e-6);
}

TEST_F(CoreAuditTest, SlotsThatLieAreRefused) {
  StartAudited();
  const gpu::ClusterEntry first = entries()[0];
  const auto message = [&](const std::function<void()>& lie) {
    WriteSlot();
    lie();
    const absl::Status status = Audit(Honest()).status();
    entries()[0] = first;
    EXPECT_EQ(status.code(), kInvalid) << status;
    return std::string(status.message());
  };
  using testing::HasSubstr;
  EXPECT_THAT(message([&] { *Word(audit().cut) = 40; }), HasSubstr("cut 40"));
  EXPECT_THAT(message([&] { *Word(audit().cut) = 0; }), HasSubstr("cut 0"));
  EXPECT_THAT(message([&] { *Word(audit().cut) = UINT32_MAX; }), HasSubstr("cut 4294967295"));
  EXPECT_THAT(message([&] { *Word(audit().counts) = UINT32_MAX; }), HasSubstr("4294967295 cl"));
  EXPECT_THAT(message([&] { *Word(audit().counts) = clusters(2) + 1; }), HasSubstr("clusters, of"));
  EXPECT_THAT(message([&] { *Word(audit().clusters) = clusters(2); }), HasSubstr("KV head 0: clu"));
  EXPECT_THAT(message([&] { *Word(audit().takes) = 17; }), HasSubstr("than the budget"));
  EXPECT_THAT(message([&] { *Word(audit().takes) = UINT32_MAX; }), HasSubstr("before the cut"));
  EXPECT_THAT(message([&] { Word(audit().clusters)[1] = 0; }), HasSubstr("there twice"));
  EXPECT_THAT(message([&] { entries()[0].first_row = UINT32_MAX; }), HasSubstr("before the cut"));
  EXPECT_EQ(core_->status().audit.steps, 0u);
  WriteSlot();
  EXPECT_TRUE(*Audit(Honest()));
  EXPECT_EQ(core_->status().audit.steps, 1u);
}

TEST_F(CoreAuditTest, OnlySlotsInTheSessionsArenasAreRead) {
  StartAudited();
  const Worker other = Attached();
  ArenaId foreign = 0;
  while (foreign <= state_arena_) foreign = AllocateArena(other, 4096)->arena;
  const auto code = [&](const std::function<void(AuditRequest&)>& change) {
    AuditRequest request = Honest();
    change(request);
    return Audit(request).status().code();
  };
  EXPECT_EQ(code([](AuditRequest&) {}), absl::StatusCode::kOk);
  EXPECT_EQ(code([&](AuditRequest& r) { r.slot.arena = foreign; }), kNotFound);
  EXPECT_EQ(code([&](AuditRequest& r) { r.slot.arena = state_arena_; }), kNotFound);
  EXPECT_EQ(code([](AuditRequest& r) { r.slot.offset += 4; }), kInvalid);
  EXPECT_EQ(code([](AuditRequest& r) { r.slot.offset = kRing - 64; }), kInvalid);
  EXPECT_EQ(code([](AuditRequest& r) { r.slot.offset = UINT64_MAX - 63; }), kInvalid);
  EXPECT_EQ(code([](AuditRequest& r) { r.slot.bytes += 64; }), kInvalid);
  EXPECT_EQ(code([](AuditRequest& r) { r.slot.bytes = 0; }), kInvalid);
  EXPECT_EQ(code([](AuditRequest& r) { r.layer = 2; }), kInvalid);
  EXPECT_EQ(code([](AuditRequest& r) { r.sequence += 1; }), kNotFound);
  const SequenceId served = MustRegister(worker_, FetchMode::kServed);
  EXPECT_EQ(code([&](AuditRequest& r) { r.sequence = served; }),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(CoreAuditTest, ASessionsMemoryStaysUntilItsAuditIsOver) {
  StartAudited();
  device_->audit.Close();
  Reply<bool> audited, waiting;
  core_->AuditDecodeStep(worker_->key, Honest(), audited.done());
  device_->audit.AwaitArrival();
  core_->AuditDecodeStep(worker_->key, Honest(), waiting.done());
  EXPECT_FALSE(*waiting.Get()) << "one at a time";
  core_->WorkerDied(worker_->session);
  Fence();
  EXPECT_GE(core_->status().gpu_used_bytes, kRing);
  EXPECT_EQ(core_->status().sequences, 1u);
  EXPECT_FALSE(audited.ready());
  device_->audit.Open();
  EXPECT_TRUE(*audited.Get());
  EXPECT_TRUE(AwaitNothingHeld());
}

TEST_F(CoreAuditTest, ACopyThatFailsFailsItsAuditAlone) {
  StartAudited();
  device_->fail_audit = true;
  EXPECT_EQ(Audit(Honest()).status().code(), absl::StatusCode::kInternal);
  device_->fail_audit = false;
  EXPECT_TRUE(*Audit(Honest()));
  EXPECT_EQ(core_->status().audit.steps, 1u);
}

}  // namespace
}  // namespace clusterkv::service
