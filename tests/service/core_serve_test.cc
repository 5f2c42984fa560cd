// Served fetch of a ServiceCore, and the counters of both modes.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

using absl::StatusCode;
using gpu::LayerCounters;

class CoreServeTest : public CoreTest {
 protected:
  StatusCode FetchCode(const Worker& worker, FetchRequest request) {
    return DoFetch(worker, std::move(request)).status().code();
  }
  // With a published prompt of 60 tokens, in [4, 52).
  SequenceId Prompted(const Worker& worker) {
    const SequenceId sequence = MustRegister(worker, FetchMode::kServed);
    MustIngest(worker, sequence, 0, 60, true);
    EXPECT_EQ(Wait(worker, sequence, 0)->cut, 52u);
    return sequence;
  }
  void Step(const Worker& worker, SequenceId sequence, uint32_t position) {
    for (uint32_t layer = 0; layer < 2; ++layer) {
      const auto result = DoFetch(worker, Fetch(sequence, position, layer));
      ASSERT_TRUE(result.ok()) << "position " << position << ": " << result.status();
    }
  }
  // Where a direct worker counts.
  LayerCounters* Counters(const Worker& worker, const RegisterRequest& request,
                          const RegisterReply& reply) {
    const auto layout = gpu::StateLayout::Create(
        request.shape, request.method.Resolved(request.shape), request.max_tokens);
    return gpu::At<LayerCounters>(worker->arena_data(reply.state_arena), layout->counters);
  }
  DaemonStatus Sample() {
    core_->Tick();
    Fence();
    // Ticks leave out sequences whose sample is on its way; a registration comes after it.
    Worker other = Attached();
    core_->EndSession(other->session, absl::OkStatus());
    core_->WorkerDied(other->session);
    Fence();
    return core_->status();
  }
};

TEST_F(CoreServeTest, ServesALayerWithOutputAndSelection) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = Prompted(worker);
  const auto results = DoFetch(worker, Fetch(sequence, 60, 0));
  ASSERT_TRUE(results.ok()) << results.status();
  ASSERT_EQ(results->size(), 1u);
  const FetchResult& result = results->front();
  EXPECT_EQ(result.sequence, sequence);
  EXPECT_EQ(result.cut, 52u);
  EXPECT_EQ(result.output.size(), 2 * 64u);
  EXPECT_EQ(result.lse.size(), 2u);
  for (const float value : result.output) EXPECT_TRUE(std::isfinite(value));
  ASSERT_EQ(result.selected.size(), 16u);
  std::set<int32_t> selected(result.selected.begin(), result.selected.end());
  EXPECT_EQ(selected.size(), 16u);
  EXPECT_GE(*selected.begin(), 4);
  EXPECT_LT(*selected.rbegin(), 52);
  EXPECT_GT(result.hit_clusters + result.missed_clusters, 0u);
}

TEST_F(CoreServeTest, LayersAndPositionsComeInOrder) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = Prompted(worker);
  const auto failed = StatusCode::kFailedPrecondition;
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 59, 0)), failed);
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 61, 0)), failed);
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 60, 1)), failed);
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 60, 2)), StatusCode::kInvalidArgument);
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 60, 0)), StatusCode::kOk);
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 61, 0)), failed);
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 61, 1)), failed);
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 60, 1)), StatusCode::kOk);
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 60, 0)), failed);  // only the last can be repeated
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 61, 0)), StatusCode::kOk);
  // What is decoded comes with the fetches, not by ingest.
  EXPECT_EQ(Ingest(worker, Range(worker, sequence, 61, 1, false)).status().code(), failed);
}

TEST_F(CoreServeTest, TheLastCallCanBeRepeated) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = Prompted(worker);
  for (uint32_t position = 60; position < 64; ++position) {
    for (uint32_t layer = 0; layer < 2; ++layer) {
      const auto first = DoFetch(worker, Fetch(sequence, position, layer));
      const auto again = DoFetch(worker, Fetch(sequence, position, layer));
      ASSERT_TRUE(first.ok() && again.ok()) << first.status() << again.status();
      EXPECT_EQ(first->front().output, again->front().output);
      EXPECT_EQ(first->front().selected, again->front().selected);
      EXPECT_EQ(again->front().missed_clusters, 0u);  // the first left them in the cache
    }
  }
  EXPECT_EQ(Sequences()[0].ingested_tokens, 64u);
}

TEST_F(CoreServeTest, AStepErrorFailsItsSequenceAlone) {
  StartCore();
  Worker worker = Attached();
  const SequenceId first = Prompted(worker);
  const RegisterRequest registered = Request(FetchMode::kServed, worker->next_key);
  const SequenceId second = Prompted(worker), third = Prompted(worker);
  const auto batch = [&](uint32_t layer, const std::vector<SequenceId>& sequences) {
    FetchRequest request = Fetch(first, 60, layer);
    request.items.resize(sequences.size(), request.items[0]);
    for (size_t i = 0; i < sequences.size(); ++i) request.items[i].sequence = sequences[i];
    return request;
  };
  const auto again = Register(worker, registered);  // by its key
  ASSERT_TRUE(again.ok() && again->sequence == second) << again.status();
  device_->fail_steps_of_generation = again->generation;
  const auto failed = DoFetch(worker, batch(0, {first, second, third}));
  EXPECT_EQ(failed.status().code(), StatusCode::kInternal);
  EXPECT_THAT(std::string(failed.status().message()),
              testing::AllOf(testing::HasSubstr("1 of 3"),
                             testing::EndsWith(fmt::format("sequence {}: step error bits {}",
                                                           second, int{gpu::kWindowOverflow}))));
  EXPECT_TRUE(worker->Await([&](const Told& told) { return told.failed.contains(second); }));
  EXPECT_EQ(worker->told().failed.size(), 1u);
  EXPECT_EQ(worker->told().failed.at(second).code(), StatusCode::kInternal);
  EXPECT_EQ(FetchCode(worker, Fetch(second, 60, 0)), StatusCode::kInternal);
  // The others have made the step.
  for (uint32_t layer = 0; layer < 2; ++layer) {
    const auto results = DoFetch(worker, batch(layer, {first, third}));
    ASSERT_TRUE(results.ok()) << results.status();
    EXPECT_EQ(results->at(0).output, results->at(1).output);
  }
  EXPECT_EQ(Sequences()[0].ingested_tokens, 61u);
  EXPECT_TRUE(*Release(worker, second));
}

TEST_F(CoreServeTest, RefusesWhatItCannotServe) {
  StartCore();
  Worker worker = Attached();
  const auto invalid = StatusCode::kInvalidArgument;
  const SequenceId early = MustRegister(worker, FetchMode::kServed);
  EXPECT_EQ(FetchCode(worker, Fetch(early, 0, 0)), StatusCode::kFailedPrecondition);
  const SequenceId direct = MustRegister(worker, FetchMode::kDirect);
  EXPECT_EQ(FetchCode(worker, Fetch(direct, 0, 0)), StatusCode::kFailedPrecondition);
  EXPECT_EQ(FetchCode(worker, Fetch(99, 0, 0)), StatusCode::kNotFound);
  const SequenceId sequence = Prompted(worker);
  const auto code = [&](const std::function<void(FetchRequest&)>& change) {
    FetchRequest request = Fetch(sequence, 60, 0);
    change(request);
    return FetchCode(worker, std::move(request));
  };
  EXPECT_EQ(code([](auto& r) { r.items.clear(); }), invalid);
  EXPECT_EQ(code([](auto& r) { r.items.push_back(r.items[0]); }), invalid);
  EXPECT_EQ(code([](auto& r) { r.items.resize(257); }), invalid);
  EXPECT_EQ(code([](auto& r) { r.layer = ~0u; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.budget_tokens = 17; }), invalid);
  EXPECT_EQ(code([](auto& r) { r.items[0].q.inline_bytes.pop_back(); }), invalid);
  EXPECT_EQ(code([](auto& r) { r.items[0].k.inline_bytes.clear(); }), invalid);
  EXPECT_EQ(code([](auto& r) { r.items[0].v = {.inline_bytes = "", .arena = 9, .bytes = 128}; }),
            StatusCode::kNotFound);
  EXPECT_EQ(code([&](auto& r) {
              r.items[0].v = {
                  .inline_bytes = "", .arena = worker->ring, .offset = kRing - 64, .bytes = 128};
            }),
            invalid);
  EXPECT_EQ(code([&](auto& r) {
              r.items[0].output = TensorPlace{.inline_bytes = "",
                                              .arena = worker->ring,
                                              .offset = ~uint64_t{63},
                                              .bytes = 2 * 65 * sizeof(float)};
            }),
            invalid);
  EXPECT_EQ(code([](auto&) {}), StatusCode::kOk);  // nothing of it was taken
}

TEST_F(CoreServeTest, TensorsMayLieInAnArena) {
  StartCore();
  Worker worker = Attached();
  const SequenceId one = Prompted(worker);
  const SequenceId two = Prompted(worker);
  const FetchRequest inline_request = Fetch(one, 60, 0);
  const auto expected = DoFetch(worker, inline_request);
  ASSERT_TRUE(expected.ok()) << expected.status();
  FetchRequest request = Fetch(two, 60, 0);
  FetchItem& item = request.items[0];
  std::byte* const ring = worker->arena_data(worker->ring);
  uint64_t offset = 0;
  for (TensorPlace* place : {&item.q, &item.k, &item.v}) {
    std::memcpy(ring + offset, place->inline_bytes.data(), place->inline_bytes.size());
    *place = {.inline_bytes = "",
              .arena = worker->ring,
              .offset = offset,
              .bytes = place->inline_bytes.size()};
    offset += 1024;
  }
  item.output = TensorPlace{
      .inline_bytes = "", .arena = worker->ring, .offset = offset, .bytes = 130 * sizeof(float)};
  const auto results = DoFetch(worker, request);
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_TRUE(results->front().output.empty());
  std::vector<float> output(130);
  std::memcpy(output.data(), ring + offset, output.size() * sizeof(float));
  // Both sequences were made of the same rows by the same seed.
  EXPECT_TRUE(std::equal(output.begin(), output.begin() + 128, expected->front().output.begin()));
  EXPECT_TRUE(std::equal(output.begin() + 128, output.end(), expected->front().lse.begin()));
}

TEST_F(CoreServeTest, AFullWindowIsRefusedUntilMoreIsPublished) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = Prompted(worker);
  device_->cluster.Close();
  uint32_t position = 60;
  // 8 + 16 * 4 slots from the cut, 52, on.
  for (; position < 52 + 72; ++position) ASSERT_NO_FATAL_FAILURE(Step(worker, sequence, position));
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, position, 0)), StatusCode::kResourceExhausted);
  device_->cluster.Open();
  EXPECT_TRUE(Wait(worker, sequence, position).ok());
  ASSERT_NO_FATAL_FAILURE(Step(worker, sequence, position));
}

TEST_F(CoreServeTest, MaxTokensIsTheEnd) {
  StartCore();
  Worker worker = Attached();
  RegisterRequest request = Request(FetchMode::kServed, worker->next_key++);
  request.max_tokens = 62;
  const auto registered = Register(worker, request);
  ASSERT_TRUE(registered.ok()) << registered.status();
  const SequenceId sequence = registered->sequence;
  MustIngest(worker, sequence, 0, 60, true);
  ASSERT_TRUE(Wait(worker, sequence, 0).ok());
  ASSERT_NO_FATAL_FAILURE(Step(worker, sequence, 60));
  ASSERT_NO_FATAL_FAILURE(Step(worker, sequence, 61));
  EXPECT_EQ(FetchCode(worker, Fetch(sequence, 62, 0)), StatusCode::kOutOfRange);
}

TEST_F(CoreServeTest, ServedCountersAreTheSumOfTheReplies) {
  StartCore();
  Worker worker = Attached();
  const SequenceId sequence = Prompted(worker);
  uint64_t hits = 0, misses = 0, hit_tokens = 0, missed_tokens = 0, gathered = 0;
  for (uint32_t position = 60; position < 80; ++position) {
    for (uint32_t layer = 0; layer < 2; ++layer) {
      const auto results = DoFetch(worker, Fetch(sequence, position, layer));
      ASSERT_TRUE(results.ok()) << results.status();
      hits += results->front().hit_clusters;
      misses += results->front().missed_clusters;
      hit_tokens += results->front().hit_tokens;
      missed_tokens += results->front().missed_tokens;
      gathered += results->front().gathered_bytes;
    }
  }
  const CacheCounters served = core_->status().served;
  EXPECT_EQ(served.hit_clusters, hits);
  EXPECT_EQ(served.missed_clusters, misses);
  EXPECT_EQ(served.hit_tokens, hit_tokens);
  EXPECT_EQ(served.missed_tokens, missed_tokens);
  EXPECT_EQ(served.gathered_bytes, gathered);
  EXPECT_GT(hits, 0u);
  EXPECT_GT(misses, 0u);
  EXPECT_EQ(served.missed_bytes, served.missed_tokens * 256);
  EXPECT_EQ(served.hit_bytes, served.hit_tokens * 256);
  EXPECT_EQ(core_->status().direct.hit_clusters, 0u);
}

TEST_F(CoreServeTest, DirectCountersAreSampledAndFoldedBeforeRelease) {
  StartCore();
  Worker worker = Attached();
  const RegisterRequest request = Request(FetchMode::kDirect, worker->next_key++);
  const auto reply = Register(worker, request);
  ASSERT_TRUE(reply.ok()) << reply.status();
  LayerCounters* const counters = Counters(worker, request, *reply);
  counters[0].hit_clusters = 10;
  counters[1].hit_clusters = 5;
  counters[1].missed_tokens = 7;
  CacheCounters direct = Sample().direct;
  EXPECT_EQ(direct.hit_clusters, 15u);
  EXPECT_EQ(direct.missed_tokens, 7u);
  EXPECT_EQ(direct.missed_bytes, 7 * 256u);
  counters[0].hit_clusters = 11;
  EXPECT_EQ(Sample().direct.hit_clusters, 16u);
  EXPECT_EQ(Sample().direct.hit_clusters, 16u);
  counters[0].hit_clusters = 20;
  EXPECT_TRUE(*Release(worker, reply->sequence));
  EXPECT_EQ(core_->status().direct.hit_clusters, 25u);
}

TEST_F(CoreServeTest, CountersThatFallOrLeapAreIgnored) {
  StartCore();
  Worker worker = Attached();
  const RegisterRequest request = Request(FetchMode::kDirect, worker->next_key++);
  const auto reply = Register(worker, request);
  ASSERT_TRUE(reply.ok()) << reply.status();
  LayerCounters* const counters = Counters(worker, request, *reply);
  counters[0].hit_clusters = 1000;
  EXPECT_EQ(Sample().direct.hit_clusters, 1000u);
  counters[0].hit_clusters = 3;
  EXPECT_EQ(Sample().direct.hit_clusters, 1000u);
  counters[0].hit_clusters = ~uint64_t{0};
  EXPECT_EQ(Sample().direct.hit_clusters, 1000u);
  counters[0].hit_clusters = 1001;
  EXPECT_EQ(Sample().direct.hit_clusters, 1001u);
}

TEST_F(CoreServeTest, TotalsNeverFallHoweverMuchAWorkerClaims) {
  StartCore();
  Worker worker = Attached();
  RegisterRequest request = Request(FetchMode::kDirect, 0);
  request.shape = {
      .layers = 64, .kv_heads = 1, .q_heads = 1, .head_dim = 256, .dtype = gpu::DType::kFp32};
  request.method.decode_segment_tokens = request.method.tokens_per_cluster = 1;
  request.method.budget_tokens = 1;
  request.max_tokens = 8;
  request.reserve_tokens = 1;
  CacheCounters last;
  for (int i = 0; i < 140; ++i) {  // a plain sum of bytes would have gone round once
    request.idempotency_key = worker->next_key++;
    const auto reply = Register(worker, request);
    ASSERT_TRUE(reply.ok()) << reply.status();
    LayerCounters* const counters = Counters(worker, request, *reply);
    constexpr uint64_t kStep = 1ull << 40;  // the most that is believed
    for (int layer = 0; layer < 64; ++layer) {
      counters[layer] = {kStep, kStep, kStep, kStep, kStep};
    }
    ASSERT_TRUE(*Release(worker, reply->sequence));
    const CacheCounters direct = core_->status().direct;
    ASSERT_GE(direct.hit_bytes, last.hit_bytes) << i;
    ASSERT_GE(direct.hit_bytes + direct.missed_bytes, last.hit_bytes + last.missed_bytes) << i;
    ASSERT_GE(direct.gathered_bytes, last.gathered_bytes) << i;
    last = direct;
  }
  EXPECT_GE(last.hit_bytes, 1ull << 62);
}

}  // namespace
}  // namespace clusterkv::service
