// What the operations do with wrong arguments of the daemon's side, and with damaged state.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "gpu/cluster_ops.h"
#include "tests/gpu/ops_conformance.h"
#include "tests/gpu/seed.h"
#include "tests/gpu/test_sequence.h"

namespace clusterkv::gpu {
namespace {

Scenario TinyScenario(uint64_t seed) {
  Scenario scenario;
  scenario.shape = {
      .layers = 1, .kv_heads = 2, .q_heads = 4, .head_dim = 64, .dtype = DType::kBf16};
  scenario.method.sink_tokens = 3;
  scenario.method.decode_segment_tokens = 16;
  scenario.method.prompt_segment_tokens = 64;
  scenario.method.tokens_per_cluster = 4;
  scenario.method.budget_tokens = 24;
  scenario.max_tokens = 200;
  scenario.seed = seed;
  return scenario;
}

void ExpectInvalid(const absl::Status& status) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
}

}  // namespace

TEST_P(OpsConformance, StageRefusesWhatDoesNotFitTheRange) {
  TestBuffer ring(*device_, *stream_, 4096);
  TestBuffer rows(*device_, *stream_, 4096);
  const StageArgs good = {.range = ring.data(),
                          .range_tokens = 4,
                          .first_token = 1,
                          .count = 3,
                          .layer_count = 1,
                          .kv_heads = 2,
                          .head_dim = 64,
                          .dtype = DType::kBf16,
                          .destinations = {rows.data(), rows.data() + 1024}};
  ClusterOps& ops = device_->cluster_ops();
  EXPECT_TRUE(ops.Stage(*stream_, good).ok());
  StageArgs args = good;
  args.count = 4;
  ExpectInvalid(ops.Stage(*stream_, args));
  args = good;
  args.first_token = ~0u;
  ExpectInvalid(ops.Stage(*stream_, args));
  args = good;
  args.destinations.pop_back();
  ExpectInvalid(ops.Stage(*stream_, args));
  args = good;
  args.destinations[1] = nullptr;
  ExpectInvalid(ops.Stage(*stream_, args));
  args = good;
  args.range = nullptr;
  ExpectInvalid(ops.Stage(*stream_, args));
  EXPECT_TRUE(stream_->Synchronize().ok());
}

TEST_P(OpsConformance, PermuteMovesRowsToAnotherPlaceOrTheSame) {
  constexpr size_t kRowBytes = 256;
  constexpr uint32_t kTokens = 37;
  std::vector<std::byte> rows(kTokens * kRowBytes);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::byte>(i / kRowBytes);
  std::vector<uint32_t> order(kTokens);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(TestSeed());
  std::shuffle(order.begin(), order.end(), random);
  TestBuffer source(*device_, *stream_, rows.size());
  TestBuffer other(*device_, *stream_, rows.size());
  TestBuffer workspace(*device_, *stream_, rows.size());
  TestBuffer orders(*device_, *stream_, kTokens * 4);
  TestBuffer positions(*device_, *stream_, kTokens * 4);
  source.Upload(rows.data(), rows.size());
  orders.Upload(order.data(), kTokens * 4);
  for (TestBuffer* destination : {&other, &source}) {
    PermuteArgs args = {.row_bytes = kRowBytes, .problems = {}};
    args.problems.push_back({.rows = source.data(),
                             .destination = destination->data(),
                             .workspace = workspace.data(),
                             .order = reinterpret_cast<const uint32_t*>(orders.data()),
                             .tokens = kTokens,
                             .first_position = 1000,
                             .positions = reinterpret_cast<uint32_t*>(positions.data())});
    ASSERT_TRUE(device_->cluster_ops().Permute(*stream_, args).ok());
    const auto moved = destination->Download<std::byte>(0, rows.size());
    const auto where = positions.Download<uint32_t>(0, kTokens);
    for (uint32_t i = 0; i < kTokens; ++i) {
      EXPECT_EQ(moved[i * kRowBytes + kRowBytes - 1], static_cast<std::byte>(order[i]));
      EXPECT_EQ(where[i], 1000 + order[i]);
    }
  }
}

TEST_P(OpsConformance, ClusterRefusesImpossibleProblems) {
  TestBuffer memory(*device_, *stream_, 65'536);
  auto* const words = reinterpret_cast<uint32_t*>(memory.data());
  const ClusterProblem good = {.rows = memory.data(),
                               .tokens = 8,
                               .clusters = 2,
                               .seed = 1,
                               .order = words + 8192,
                               .sizes = words + 9000,
                               .centroids = memory.data() + 40'000,
                               .value_means = memory.data() + 48'000,
                               .count = words + 16'000};
  ClusterArgs args = {.head_dim = 64,
                      .dtype = DType::kBf16,
                      .iterations = 3,
                      .largest_cluster_tokens = 16,
                      .center_keys = false,
                      .problems = {good}};
  ClusterOps& ops = device_->cluster_ops();
  EXPECT_TRUE(ops.Cluster(*stream_, args).ok());
  for (uint32_t clusters : {0u, 9u}) {
    args.problems[0].clusters = clusters;
    ExpectInvalid(ops.Cluster(*stream_, args));
  }
  args.problems[0] = good;
  args.problems[0].count = nullptr;
  ExpectInvalid(ops.Cluster(*stream_, args));
  args.problems[0] = good;
  args.iterations = 0;
  ExpectInvalid(ops.Cluster(*stream_, args));
  EXPECT_TRUE(stream_->Synchronize().ok());
}

// The arguments of a segment [3, 11) of two heads with two clusters each.
class PublishFixture {
 public:
  PublishFixture(Device& device, Stream& stream, const TestSequence& sequence)
      : sizes_(device, stream, 64), means_(device, stream, 4096) {
    const std::vector<uint32_t> sizes = {5, 3};
    sizes_.Upload(sizes.data(), 8);
    args.state = sequence.slot().state;
    args.layout = &sequence.layout();
    args.segment_begin = 3;
    args.segment_end = 11;
    args.problems.resize(2, {.cluster_begin = 0,
                             .cluster_count = 2,
                             .sizes = reinterpret_cast<const uint32_t*>(sizes_.data()),
                             .centroids = means_.data(),
                             .value_means = means_.data()});
  }

  PublishArgs args;

 private:
  TestBuffer sizes_, means_;
};

TEST_P(OpsConformance, PublishRefusesWhatTheLayoutDoesNotHold) {
  TestSequence sequence(*device_, *stream_, TinyScenario(TestSeed()), 1);
  const StateLayout& layout = sequence.layout();
  PublishFixture good(*device_, *stream_, sequence);
  ClusterOps& ops = device_->cluster_ops();
  std::vector<PublishArgs> wrong(8, good.args);
  wrong[0].segment = layout.max_segments;
  wrong[1].segment_begin = 2;  // within the sinks
  wrong[2].segment_end = 201;
  wrong[3].segment_end = 3;
  wrong[4].problems.pop_back();
  wrong[5].problems[1].cluster_begin = layout.max_clusters - 1;
  wrong[6].problems[0].rows_offset = ~0u;
  wrong[7].problems[0].sizes = nullptr;
  for (const PublishArgs& args : wrong) ExpectInvalid(ops.Publish(*stream_, args));
  EXPECT_TRUE(stream_->Synchronize().ok());
}

TEST_P(OpsConformance, PublishKeepsASegmentBackWhoseSizesDoNotAddUp) {
  TestSequence sequence(*device_, *stream_, TinyScenario(TestSeed()), 1);
  PublishFixture fixture(*device_, *stream_, sequence);
  ClusterOps& ops = device_->cluster_ops();
  fixture.args.segment_end = 12;
  ASSERT_TRUE(ops.Publish(*stream_, fixture.args).ok());
  EXPECT_EQ(stream_->Synchronize().code(), absl::StatusCode::kInternal);
  const uint64_t counter = sequence.layout().published_segments;
  EXPECT_EQ(sequence.state().Download<uint32_t>(counter, 1)[0], 0u);
  fixture.args.segment_end = 11;
  ASSERT_TRUE(ops.Publish(*stream_, fixture.args).ok());
  EXPECT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(sequence.state().Download<uint32_t>(counter, 1)[0], 1u);
}

TEST_P(OpsConformance, FetchWithoutItsHostChunkIsAnError) {
  TestSequence sequence(*device_, *stream_, TinyScenario(TestSeed()), 1);
  sequence.IngestPrompt(100);
  sequence.PublishComplete();
  const auto unmapped = PinnedChunkTable(*device_, sequence.layout().max_segments);
  TestBuffer queries(*device_, *stream_, 4 * 128);
  const QuerySource source = {.q = queries.data(), .batch_stride = 0, .head_stride = 128};
  TestBuffer out(*device_, *stream_, 4 * 64 * sizeof(float));
  const AttentionTarget target = {
      .out = reinterpret_cast<float*>(out.data()), .batch_stride = 0, .head_stride = 64};
  DecodeOps& ops = device_->decode_ops();
  for (const std::byte* const* chunks :
       {reinterpret_cast<const std::byte* const*>(unmapped->data()),
        (const std::byte* const*)nullptr}) {
    BatchSlot slot = sequence.slot();
    slot.host_chunks = chunks;
    const Batch batch(&slot, 1);
    ASSERT_TRUE(ops.BeginStep(*stream_, batch).ok());
    ASSERT_TRUE(ops.Select(*stream_, batch, 0, source, 10).ok());
    ASSERT_TRUE(ops.Fetch(*stream_, batch, 0).ok());
    EXPECT_EQ(stream_->Synchronize().code(), absl::StatusCode::kFailedPrecondition);
    ASSERT_TRUE(ops.DecodeLayer(*stream_, batch, 0, source, 10, target).ok());
    EXPECT_EQ(stream_->Synchronize().code(), absl::StatusCode::kFailedPrecondition);
  }
}

TEST_P(OpsConformance, DamagedStateLeadsNowhereOutsideItself) {
  SCOPED_TRACE(SeedTrace(TestSeed()));
  std::mt19937_64 random(TestSeed());
  Scenario scenario = TinyScenario(TestSeed());
  scenario.method.estimate = true;
  const TestSequence sequence(*device_, *stream_, scenario, 1);
  const StateLayout& layout = sequence.layout();
  constexpr size_t kGuard = 1 << 20;
  TestBuffer block(*device_, *stream_, layout.total_bytes + 2 * kGuard);
  // Chunk 0 is large enough for any cluster that passes for one.
  TestBuffer chunk(*device_, *stream_, layout.max_rows * layout.row_bytes());
  const auto table = PinnedChunkTable(*device_, 1);
  auto* const chunks = reinterpret_cast<const std::byte**>(table->data());
  chunks[0] = chunk.data();
  TestBuffer tensors(*device_, *stream_, 1 << 16);
  const QuerySource queries = {.q = tensors.data(), .batch_stride = 0, .head_stride = 128};
  const KvSource kv = {.k = tensors.data(), .v = tensors.data(), .head_stride = 128};
  const AttentionTarget target = {
      .out = reinterpret_cast<float*>(tensors.data() + 8192), .batch_stride = 0, .head_stride = 64};
  for (int round = 0; round < 200; ++round) {
    std::vector<std::byte> bytes(layout.total_bytes + 2 * kGuard, std::byte{0xa5});
    // Words between hardly wrong and absurd.
    const uint32_t most = round % 4 == 0 ? ~0u : 1u << (round % 31);
    for (size_t at = kGuard; at + 4 <= kGuard + layout.total_bytes; at += 4) {
      const auto word = static_cast<uint32_t>(random()) % most;
      std::memcpy(&bytes[at], &word, 4);
    }
    for (uint32_t c = 0; c < layout.kv_heads * layout.max_clusters; ++c) {
      std::byte* const entry = &bytes[kGuard + layout.clusters + c * sizeof(ClusterEntry)];
      std::memset(entry + offsetof(ClusterEntry, chunk), 0, 8);  // chunk and its offset
    }
    const StateHeader header = {
        .magic = kStateMagic, .version = kStateLayoutVersion, .generation = 1};
    std::memcpy(&bytes[kGuard], &header, sizeof(header));
    block.Upload(bytes.data(), bytes.size());
    const BatchSlot slot = {.state = block.data() + kGuard,
                            .layout = &layout,
                            .host_chunks = chunks,
                            .generation = 1,
                            .active = 1};
    const Batch batch(&slot, 1);
    DecodeOps& ops = device_->decode_ops();
    // Each also alone: an earlier one would put its scratch in order.
    if (round % 3 != 0) {
      ASSERT_TRUE(ops.BeginStep(*stream_, batch).ok());
      ASSERT_TRUE(ops.Append(*stream_, batch, 0, kv).ok());
    }
    if (round % 3 == 1) {
      ASSERT_TRUE(ops.Select(*stream_, batch, 0, queries, 24).ok());
    }
    if (round % 2 == 0) {
      ASSERT_TRUE(ops.DecodeLayer(*stream_, batch, 0, queries, 24, target).ok());
    } else {
      ASSERT_TRUE(ops.Fetch(*stream_, batch, 0).ok());
    }
    (void)stream_->Synchronize();  // may tell of the damage
    // The length is bounded by the sequence's, or attending would take for ever.
    ASSERT_TRUE(ops.Attend(*stream_, batch, 0, queries, target).ok());
    ASSERT_TRUE(stream_->Synchronize().ok());
    for (size_t begin : {size_t{0}, kGuard + layout.total_bytes}) {
      const auto guard = block.Download<std::byte>(begin, kGuard);
      ASSERT_TRUE(std::all_of(guard.begin(), guard.end(),
                              [](std::byte byte) { return byte == std::byte{0xa5}; }))
          << "round " << round;
    }
  }
}

}  // namespace clusterkv::gpu
