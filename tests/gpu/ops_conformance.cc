#include "tests/gpu/ops_conformance.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "tests/gpu/decode_checker.h"
#include "tests/gpu/seed.h"
#include "tests/gpu/test_sequence.h"

namespace clusterkv::gpu {
namespace {

Scenario SmallScenario(uint64_t seed) {
  Scenario scenario;
  scenario.shape = {
      .layers = 2, .kv_heads = 2, .q_heads = 6, .head_dim = 64, .dtype = DType::kFp16};
  scenario.method.sink_tokens = 5;
  scenario.method.min_window_tokens = 7;
  scenario.method.decode_segment_tokens = 24;
  scenario.method.prompt_segment_tokens = 100;
  scenario.method.tokens_per_cluster = 6;
  scenario.method.budget_tokens = 50;
  scenario.method.window_lag_segments = 1;
  scenario.max_tokens = 600;
  scenario.seed = seed;
  return scenario;
}

// Null: the machine has no such device, and the test is to be skipped.
std::unique_ptr<Device> NewDevice(const std::string& backend) {
  auto device = CreateDevice({.backend = backend, .threads = 3});
  if (absl::IsUnavailable(device.status()) && std::getenv("CLUSTERKV_REQUIRE_CUDA") == nullptr) {
    return nullptr;
  }
  EXPECT_TRUE(device.ok()) << device.status();
  return device.ok() ? *std::move(device) : nullptr;
}

// Reports of a batch, with what no layer leaves in them.
class Reports {
 public:
  Reports(Device& device, size_t slots)
      : memory_(*device.AllocatePinned(slots * sizeof(LayerReport))), slots_(slots) {
    std::memset(memory_->data(), 0x55, memory_->bytes());
  }
  absl::Span<LayerReport> span() const {
    return {reinterpret_cast<LayerReport*>(memory_->data()), slots_};
  }

 private:
  const std::unique_ptr<DeviceMemory> memory_;
  const size_t slots_;
};

}  // namespace

void OpsConformance::SetUp() {
  device_ = NewDevice(GetParam());
  if (device_ == nullptr) GTEST_SKIP() << "no device for backend " << GetParam();
  stream_ = *device_->CreateStream("conformance");
}

TEST_P(OpsShapes, StepsAgreeWithTheirDefinition) {
  const auto& [backend, head_dim, group, dtype] = GetParam();
  const uint64_t seed = TestSeed() + static_cast<uint64_t>(head_dim * 100 + group);
  SCOPED_TRACE(SeedTrace(TestSeed()));
  const std::unique_ptr<Device> device = NewDevice(backend);
  if (device == nullptr) GTEST_SKIP() << "no device for backend " << backend;
  const std::unique_ptr<Stream> stream = *device->CreateStream("shapes");
  for (GroupRule rule : {GroupRule::kSoftmax, GroupRule::kMean, GroupRule::kMax}) {
    for (bool estimate : {false, true}) {
      Scenario scenario = SmallScenario(seed);
      scenario.shape.head_dim = static_cast<uint32_t>(head_dim);
      scenario.shape.q_heads = scenario.shape.kv_heads * static_cast<uint32_t>(group);
      scenario.shape.dtype = dtype;
      scenario.method.group = rule;
      scenario.method.estimate = estimate;
      scenario.max_tokens = 300;
      TestSequence sequence(*device, *stream, scenario, 1);
      sequence.IngestPrompt(250);
      sequence.PublishComplete();
      ASSERT_EQ(sequence.segments(), 3u);
      DecodeChecker checker(*device, *stream, {&sequence}, seed);
      for (uint32_t budget : {50u, 1u, 37u}) {
        checker.Step(budget);
        ASSERT_FALSE(HasFailure())
            << GroupRuleName(rule) << " estimate " << estimate << " budget " << budget;
        EXPECT_EQ(checker.errors[0], 0u);
      }
    }
  }
}

TEST_P(OpsConformance, CacheEvictsTheLeastWorthOverManySteps) {
  SCOPED_TRACE(SeedTrace(TestSeed()));
  for (GroupRule rule : {GroupRule::kSoftmax, GroupRule::kMean, GroupRule::kMax}) {
    SCOPED_TRACE(GroupRuleName(rule));
    Scenario scenario = SmallScenario(TestSeed());
    scenario.method.group = rule;
    scenario.method.cache_tokens = 2 * 50 + 24;  // the least there may be
    TestSequence sequence(*device_, *stream_, scenario, 1);
    sequence.IngestPrompt(450);
    sequence.PublishComplete();
    DecodeChecker checker(*device_, *stream_, {&sequence}, TestSeed());
    std::mt19937_64 random(TestSeed());
    for (int step = 0; step < 100; ++step) {
      checker.Step(1 + static_cast<uint32_t>(random() % 50));
      ASSERT_FALSE(HasFailure()) << "step " << step;
      sequence.PublishComplete();
    }
    EXPECT_GT(checker.hits, 100u);
    EXPECT_GT(checker.misses, 100u);
    EXPECT_GT(checker.evictions, 20u);
  }
}

TEST_P(OpsConformance, SameStepsKeepTheSameClusters) {
  SCOPED_TRACE(SeedTrace(TestSeed()));
  Scenario scenario = SmallScenario(TestSeed());
  scenario.method.cache_tokens = 2 * 50 + 24;
  const auto run = [&] {
    TestSequence sequence(*device_, *stream_, scenario, 1);
    sequence.IngestPrompt(450);
    sequence.PublishComplete();
    DecodeChecker checker(*device_, *stream_, {&sequence}, TestSeed());
    for (int step = 0; step < 20; ++step) checker.Step(50);
    EXPECT_GT(checker.evictions, 0u);
    const StateLayout& layout = sequence.layout();
    // Last use and mean scores, bit by bit.
    return sequence.state().Download<uint32_t>(layout.last_used,
                                               (layout.free_slots - layout.last_used) / 4);
  };
  const std::vector<uint32_t> first = run();
  EXPECT_EQ(run(), first);
}

TEST_P(OpsConformance, MeanScoresSurviveAStepThatIsNotFinite) {
  Scenario scenario = SmallScenario(TestSeed());
  TestSequence sequence(*device_, *stream_, scenario, 1);
  sequence.IngestPrompt(200);
  sequence.PublishComplete();
  const std::vector<BatchSlot> batch = {sequence.slot()};
  const StateLayout& layout = sequence.layout();
  const size_t clusters = sequence.clusters(0, 0).size();
  DecodeOps& ops = device_->decode_ops();
  TestBuffer queries(*device_, *stream_, 6 * 64 * 2);
  const QuerySource source = {
      .q = queries.data(), .batch_stride = 6 * 64 * 2, .head_stride = 64 * 2};
  TestBuffer out(*device_, *stream_, 6 * 64 * 4);
  const AttentionTarget target = {
      .out = reinterpret_cast<float*>(out.data()), .batch_stride = 6 * 64, .head_stride = 64};
  const auto means_after = [&](double element, bool in_one) {
    std::vector<std::byte> values(6 * 64 * 2);
    for (size_t e = 0; e < 6 * 64; ++e) StoreValue(DType::kFp16, element, &values[e * 2]);
    queries.Upload(values.data(), values.size());
    EXPECT_TRUE(ops.BeginStep(*stream_, batch).ok());
    if (in_one) {
      EXPECT_TRUE(ops.DecodeLayer(*stream_, batch, 0, source, 50, target).ok());
    } else {
      EXPECT_TRUE(ops.Select(*stream_, batch, 0, source, 50).ok());
    }
    return sequence.state().Download<float>(layout.mean_scores, clusters);
  };
  for (bool in_one : {false, true}) {
    // Equal scores: each query head of three gives every cluster the same share.
    const auto share = static_cast<float>(3.0 / static_cast<double>(clusters));
    for (float mean : means_after(0.0, in_one)) EXPECT_NEAR(mean, 0.2f * share, 1e-6f);
    for (float mean : means_after(std::nan(""), in_one)) EXPECT_EQ(mean, 0.0f);
    for (float mean : means_after(0.0, in_one)) EXPECT_NEAR(mean, 0.2f * share, 1e-6f);
    for (float mean : means_after(std::nan(""), in_one)) EXPECT_EQ(mean, 0.0f);
  }
}

TEST_P(OpsConformance, RetrieveAllEqualsDenseForAnyHistory) {
  SCOPED_TRACE(SeedTrace(TestSeed()));
  std::mt19937_64 random(TestSeed());
  for (int round = 0; round < 6; ++round) {
    Scenario scenario = SmallScenario(random());
    scenario.method.budget_tokens = 600;
    scenario.method.estimate = round % 2 == 1;  // nothing is left to estimate
    TestSequence sequence(*device_, *stream_, scenario, 1);
    sequence.IngestPrompt(static_cast<uint32_t>(random() % 300));
    sequence.PublishComplete();
    DecodeChecker checker(*device_, *stream_, {&sequence}, random());
    for (int step = 0; step < 100; ++step) {
      // The checker compares with all it selected: here that is every token.
      checker.Step(600);
      ASSERT_FALSE(HasFailure()) << "round " << round << " step " << step;
      if (random() % 8 == 0) sequence.PublishComplete();
      const uint32_t ahead = sequence.length - std::min(sequence.length, sequence.cut());
      if (ahead >= sequence.layout().window_slots) sequence.PublishComplete();
      EXPECT_EQ(checker.errors[0], 0u);
    }
  }
}

TEST_P(OpsConformance, SequenceStartsFromNothing) {
  TestSequence sequence(*device_, *stream_, SmallScenario(TestSeed()), 1);
  DecodeChecker checker(*device_, *stream_, {&sequence}, TestSeed());
  for (int step = 0; step < 80; ++step) {
    checker.Step(50);
    ASSERT_FALSE(HasFailure()) << "step " << step;
    sequence.PublishComplete();
  }
  EXPECT_GE(sequence.segments(), 2u);
}

TEST_P(OpsConformance, MethodWithoutSinksAndWindowWorks) {
  Scenario scenario = SmallScenario(TestSeed());
  scenario.method.sink_tokens = 0;
  scenario.method.min_window_tokens = 0;
  TestSequence sequence(*device_, *stream_, scenario, 1);
  sequence.IngestPrompt(100);
  sequence.PublishComplete();
  DecodeChecker checker(*device_, *stream_, {&sequence}, TestSeed());
  for (int step = 0; step < 30; ++step) {
    checker.Step(20);
    ASSERT_FALSE(HasFailure()) << "step " << step;
    sequence.PublishComplete();
  }
}

TEST_P(OpsConformance, BatchedSequencesDoNotMix) {
  const uint64_t seed = TestSeed();
  TestSequence a(*device_, *stream_, SmallScenario(seed), 1);
  TestSequence b(*device_, *stream_, SmallScenario(seed + 1), 2);
  Scenario other = SmallScenario(seed + 2);
  other.method.sink_tokens = 1;
  other.method.tokens_per_cluster = 3;
  other.method.group = GroupRule::kMax;
  other.max_tokens = 400;
  TestSequence c(*device_, *stream_, other, 3);
  a.IngestPrompt(333);
  b.IngestPrompt(3);
  c.IngestPrompt(128);
  for (TestSequence* sequence : {&a, &b, &c}) sequence->PublishComplete();
  DecodeChecker checker(*device_, *stream_, {&a, &b, &c}, seed);
  for (int step = 0; step < 40; ++step) {
    checker.Step(33);
    ASSERT_FALSE(HasFailure()) << "step " << step;
    for (TestSequence* sequence : {&a, &b, &c}) sequence->PublishComplete();
  }
}

TEST_P(OpsConformance, StepSeesOnlyWhatWasPublishedWhenItBegan) {
  Scenario scenario = SmallScenario(TestSeed());
  TestSequence sequence(*device_, *stream_, scenario, 1);
  sequence.IngestPrompt(100);
  sequence.PublishComplete();
  const StateLayout& layout = sequence.layout();
  const std::vector<BatchSlot> batch = {sequence.slot()};
  ASSERT_TRUE(device_->decode_ops().BeginStep(*stream_, batch).ok());
  sequence.length = 140;
  const uint32_t cut = sequence.cut();
  const uint32_t segments = sequence.segments();
  sequence.PublishComplete();
  ASSERT_GT(sequence.segments(), segments);
  TestBuffer queries(*device_, *stream_, 6 * 64 * 2);
  const QuerySource source = {
      .q = queries.data(), .batch_stride = 6 * 64 * 2, .head_stride = 64 * 2};
  ASSERT_TRUE(device_->decode_ops().Select(*stream_, batch, 0, source, 50).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  const StepLatch latch = sequence.state().Download<StepLatch>(layout.latch, 1)[0];
  EXPECT_EQ(latch.segments, segments);
  EXPECT_EQ(latch.cut, cut);
  EXPECT_EQ(latch.length, 101u);
  EXPECT_EQ(latch.step, 1u);
  const auto run = sequence.state().Download<SegmentRun>(layout.segment_runs, segments).back();
  const auto count = sequence.state().Download<uint32_t>(layout.selected_count, 1)[0];
  const auto selected = sequence.state().Download<uint32_t>(layout.selected_cluster, count);
  ASSERT_GT(count, 0u);
  // All scores are equal, so the lowest ids are chosen, in order.
  for (uint32_t i = 0; i < count; ++i) EXPECT_EQ(selected[i], i);
  for (uint32_t cluster : selected) EXPECT_LT(cluster, run.cluster_end);
}

TEST_P(OpsConformance, WindowRingWrapsWithinOneWrite) {
  Scenario scenario = SmallScenario(TestSeed());
  TestSequence sequence(*device_, *stream_, scenario, 1);
  const StateLayout& layout = sequence.layout();
  // One range many times the ring; the newest of it must stay, whatever order it is copied in.
  const uint32_t count = 7 * layout.window_slots + 3;
  ASSERT_TRUE(device_->decode_ops().WriteTokens(*stream_, sequence.WriteArgs(0, count)).ok());
  const size_t half = layout.row_bytes() / 2;
  for (uint32_t layer = 0; layer < layout.layers; ++layer) {
    for (uint32_t kv_head = 0; kv_head < layout.kv_heads; ++kv_head) {
      const size_t head = layout.head_index(layer, kv_head);
      for (uint32_t p = count - layout.window_slots; p < count; ++p) {
        const auto row = sequence.state().Download<std::byte>(
            layout.window +
                (head * layout.window_slots + p % layout.window_slots) * layout.row_bytes(),
            layout.row_bytes());
        for (bool v : {false, true}) {
          ASSERT_TRUE(std::equal(row.begin() + static_cast<ptrdiff_t>(v ? half : 0),
                                 row.begin() + static_cast<ptrdiff_t>(v ? 2 * half : half),
                                 sequence.token_bytes(layer, v, p, kv_head)))
              << p;
        }
      }
    }
  }
}

TEST_P(OpsConformance, StaleGenerationGivesNothingAndTouchesNothing) {
  TestSequence sequence(*device_, *stream_, SmallScenario(TestSeed()), 7);
  sequence.IngestPrompt(200);
  sequence.PublishComplete();
  const StateLayout& layout = sequence.layout();
  BatchSlot stale = sequence.slot();
  stale.generation = 6;
  BatchSlot inactive = sequence.slot();
  inactive.active = 0;
  const std::vector<BatchSlot> batch = {stale, inactive};
  const auto before = sequence.state().Download<std::byte>(0, layout.total_bytes);
  TestBuffer queries(*device_, *stream_, 2 * 6 * 64 * 2);
  TestBuffer out(*device_, *stream_, 2 * 6 * 64 * 4);
  TestBuffer lse(*device_, *stream_, 2 * 6 * 4);
  const std::vector<float> sevens(2 * 6 * 64, 7.0f);
  out.Upload(sevens.data(), sevens.size() * 4);
  lse.Upload(sevens.data(), 2 * 6 * 4);
  const QuerySource source = {
      .q = queries.data(), .batch_stride = 6 * 64 * 2, .head_stride = 64 * 2};
  const AttentionTarget target = {.out = reinterpret_cast<float*>(out.data()),
                                  .batch_stride = 6 * 64,
                                  .head_stride = 64,
                                  .lse = reinterpret_cast<float*>(lse.data()),
                                  .lse_batch_stride = 6};
  DecodeOps& ops = device_->decode_ops();
  WriteTokensArgs write = sequence.WriteArgs(0, 100);
  write.slot = stale;
  ASSERT_TRUE(ops.WriteTokens(*stream_, write).ok());
  ASSERT_TRUE(ops.BeginStep(*stream_, batch).ok());
  const KvSource kv = {.k = queries.data(), .v = queries.data(), .head_stride = 128};
  ASSERT_TRUE(ops.Append(*stream_, batch, 1, kv).ok());
  ASSERT_TRUE(ops.Select(*stream_, batch, 1, source, 50).ok());
  ASSERT_TRUE(ops.Fetch(*stream_, batch, 1).ok());
  ASSERT_TRUE(ops.Attend(*stream_, batch, 1, source, target).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  const auto separately = out.Download<float>(0, 2 * 6 * 64);
  out.Upload(sevens.data(), sevens.size() * 4);
  ASSERT_TRUE(ops.DecodeLayer(*stream_, batch, 1, source, 50, target).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(out.Download<float>(0, 2 * 6 * 64), separately);
  std::vector<uint32_t> errors(2, 99);
  ASSERT_TRUE(ops.EndStep(*stream_, batch, absl::MakeSpan(errors)).ok());
  Reports reports(*device_, 2);
  ASSERT_TRUE(ops.ReportLayer(*stream_, batch, 1, reports.span()).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(errors, (std::vector<uint32_t>{kStaleGeneration, 0}));
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(reports.span()[i].errors, errors[i]);
    EXPECT_EQ(reports.span()[i].cut, 0u);
    EXPECT_EQ(reports.span()[i].counters.hit_tokens, 0u);
  }
  EXPECT_EQ(sequence.state().Download<std::byte>(0, layout.total_bytes), before);
  const auto outputs = out.Download<float>(0, 2 * 6 * 64);
  for (size_t i = 0; i < outputs.size(); ++i) EXPECT_EQ(outputs[i], i < 6 * 64 ? 0.0f : 7.0f);
  const auto sums = lse.Download<float>(0, 12);
  for (size_t i = 0; i < sums.size(); ++i) {
    EXPECT_EQ(sums[i], i < 6 ? -std::numeric_limits<float>::infinity() : 7.0f);
  }
}

TEST_P(OpsConformance, ForeignHeaderCountsAsStale) {
  TestSequence sequence(*device_, *stream_, SmallScenario(TestSeed()), 7);
  ASSERT_TRUE(stream_->Synchronize().ok());
  const StateHeader good = sequence.state().Download<StateHeader>(sequence.layout().header, 1)[0];
  EXPECT_EQ(good.magic, kStateMagic);
  EXPECT_EQ(good.generation, 7u);
  StateHeader magic = good;
  ++magic.magic;
  StateHeader version = good;
  ++version.version;
  for (const StateHeader& header : {magic, version}) {
    sequence.state().Upload(&header, sizeof(header));  // the header is first
    const std::vector<BatchSlot> batch = {sequence.slot()};
    std::vector<uint32_t> errors(1, 99);
    ASSERT_TRUE(device_->decode_ops().EndStep(*stream_, batch, absl::MakeSpan(errors)).ok());
    ASSERT_TRUE(stream_->Synchronize().ok());
    EXPECT_EQ(errors[0], uint32_t{kStaleGeneration});
  }
}

TEST_P(OpsConformance, WindowOverflowIsReportedOnceAndHealsWhenPublished) {
  Scenario scenario = SmallScenario(TestSeed());
  TestSequence sequence(*device_, *stream_, scenario, 1);
  const uint32_t slots = sequence.layout().window_slots;
  sequence.IngestPrompt(5 + slots);  // a window that is just full
  const std::vector<BatchSlot> batch = {sequence.slot()};
  DecodeOps& ops = device_->decode_ops();
  std::vector<uint32_t> errors(1, 99);
  ASSERT_TRUE(ops.EndStep(*stream_, batch, absl::MakeSpan(errors)).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(errors[0], 0u);
  ASSERT_TRUE(ops.BeginStep(*stream_, batch).ok());
  ASSERT_TRUE(ops.EndStep(*stream_, batch, absl::MakeSpan(errors)).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(errors[0], uint32_t{kWindowOverflow});
  ASSERT_TRUE(ops.EndStep(*stream_, batch, absl::MakeSpan(errors)).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(errors[0], 0u) << "cleared once reported";
  Reports reports(*device_, 1);
  for (const uint32_t expected : {uint32_t{kWindowOverflow}, 0u}) {
    if (expected != 0) {
      ASSERT_TRUE(ops.BeginStep(*stream_, batch).ok());
    }
    ASSERT_TRUE(ops.ReportLayer(*stream_, batch, 0, reports.span()).ok());
    ASSERT_TRUE(stream_->Synchronize().ok());
    EXPECT_EQ(reports.span()[0].errors, expected);
  }
  sequence.Publish({5, 20});
  ASSERT_TRUE(ops.BeginStep(*stream_, batch).ok());
  ASSERT_TRUE(ops.EndStep(*stream_, batch, absl::MakeSpan(errors)).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(errors[0], 0u);
}

TEST_P(OpsConformance, WrongArgumentsAreRefusedWhenEnqueued) {
  TestSequence sequence(*device_, *stream_, SmallScenario(TestSeed()), 1);
  const std::vector<BatchSlot> batch = {sequence.slot()};
  DecodeOps& ops = device_->decode_ops();
  TestBuffer buffer(*device_, *stream_, 6 * 64 * 4);
  const QuerySource q = {.q = buffer.data(), .batch_stride = 0, .head_stride = 128};
  const KvSource kv = {.k = buffer.data(), .v = buffer.data(), .head_stride = 128};
  const AttentionTarget target = {.out = reinterpret_cast<float*>(buffer.data())};
  std::vector<absl::Status> refused = {
      ops.Append(*stream_, batch, 2, kv),
      ops.Append(*stream_, batch, 0, {}),
      ops.Select(*stream_, batch, 2, q, 10),
      ops.Select(*stream_, batch, 0, {}, 10),
      ops.Select(*stream_, batch, 0, q, 51),
      ops.Fetch(*stream_, batch, ~0u),
      ops.Attend(*stream_, batch, 2, q, target),
      ops.Attend(*stream_, batch, 0, {}, target),
      ops.Attend(*stream_, batch, 0, q, {}),
      ops.EndStep(*stream_, batch, {}),
      ops.DecodeLayer(*stream_, batch, 2, q, 10, target),
      ops.DecodeLayer(*stream_, batch, 0, q, 51, target),
      ops.DecodeLayer(*stream_, batch, 0, q, 10, {}),
  };
  BatchSlot without_layout = sequence.slot();
  without_layout.layout = nullptr;
  refused.push_back(ops.BeginStep(*stream_, Batch(&without_layout, 1)));
  WriteTokensArgs write = sequence.WriteArgs(590, 10);
  write.count = 11;
  refused.push_back(ops.WriteTokens(*stream_, write));
  write = sequence.WriteArgs(0, 1);
  write.layer_begin = 1;
  refused.push_back(ops.WriteTokens(*stream_, write));
  write = sequence.WriteArgs(0, 1);
  write.length_after = 601;
  refused.push_back(ops.WriteTokens(*stream_, write));
  for (size_t i = 0; i < refused.size(); ++i) {
    EXPECT_EQ(refused[i].code(), absl::StatusCode::kInvalidArgument) << i << ": " << refused[i];
  }
  EXPECT_TRUE(stream_->Synchronize().ok()) << "nothing was enqueued";
}

}  // namespace clusterkv::gpu
