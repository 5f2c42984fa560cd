// The plan against a core that is given what the plan says: all that was planned is admitted, and
// nothing more.
#include "service/size_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "service/config.h"
#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

using testing::HasSubstr;

constexpr uint64_t kChunkBytes = 64 << 10;
constexpr uint64_t kRingBytes = 256 << 10;

SizeQuestion SmallQuestion() {
  SizeQuestion question;
  question.shape = {.layers = 2, .kv_heads = 1, .q_heads = 2, .head_dim = 64};
  question.method.sink_tokens = 4;
  question.method.min_window_tokens = 8;
  question.method.prompt_segment_tokens = 32;
  question.method.decode_segment_tokens = 16;
  question.method.tokens_per_cluster = 8;
  question.method.budget_tokens = 16;
  question.max_tokens = 777;
  question.sequences = 5;
  question.workers = 2;
  question.ring_bytes = kRingBytes;
  question.host_chunk_bytes = kChunkBytes;
  return question;
}

SizeQuestion Llama8b() {
  SizeQuestion question;
  question.shape = {.layers = 32, .kv_heads = 8, .q_heads = 32, .head_dim = 128};
  question.method = *gpu::MethodPreset("default");
  question.max_tokens = 131'072;
  return question;
}

class SizePlanTest : public CoreTest {
 protected:
  SizePlanTest() : CoreTest(Chunks()) {}
  static uint32_t Chunks() {
    const SizePlan plan = *PlanSize(SmallQuestion());
    EXPECT_EQ(plan.host_memory % kChunkBytes, 0u);
    return static_cast<uint32_t>(plan.host_memory / kChunkBytes);
  }
};

TEST_F(SizePlanTest, IsWhatTheCoreAdmits) {
  static_assert(kChunk == kChunkBytes && kRing == kRingBytes);
  const SizeQuestion question = SmallQuestion();
  const SizePlan plan = *PlanSize(question);
  CoreOptions options;
  options.gpu_memory_bytes = plan.gpu_memory;
  StartCore(options);
  const Worker workers[] = {Attached(), Attached()};
  const auto add = [&](const Worker& worker) {
    RegisterRequest request;
    request.shape = question.shape;
    request.method = question.method;
    request.max_tokens = question.max_tokens;
    request.idempotency_key = worker->next_key++;
    return Register(worker, request).status();
  };
  for (uint32_t i = 0; i < question.sequences; ++i) {
    const absl::Status added = add(workers[i % 2]);
    ASSERT_TRUE(added.ok()) << i << ": " << added;
  }
  EXPECT_EQ(core_->status().gpu_used_bytes, 2 * kRingBytes + question.sequences * plan.state);
  EXPECT_EQ(core_->status().host.reserved_bytes, plan.host_memory);
  EXPECT_EQ(add(workers[1]).code(), absl::StatusCode::kResourceExhausted);
}

TEST(SizePlan, TakesTheStateApart) {
  const SizePlan plan = *PlanSize(Llama8b());
  EXPECT_EQ(plan.full_kv, 16ull << 30);
  EXPECT_EQ(plan.state, plan.cache + plan.clusters + plan.window + plan.rows + plan.rest);
  // 4 budgets and the largest cluster of 4 x 16 tokens, of 256 heads, of 512 bytes.
  EXPECT_EQ(plan.cache, 256ull * (4 * 1024 + 64) * 512);
  EXPECT_LT(plan.state, plan.full_kv / 4);
  EXPECT_GE(plan.host, plan.full_kv);
  EXPECT_LT(static_cast<double>(plan.host), 1.1 * static_cast<double>(plan.full_kv));
}

TEST(SizePlan, ChoosesAChunkAsTheDaemonDoes) {
  SizeQuestion question = Llama8b();
  for (const uint32_t sequences : {1u, 4u, 100u}) {
    question.sequences = sequences;
    const SizePlan plan = *PlanSize(question);
    EXPECT_EQ(plan.host_chunk, AutoHostChunk(plan.host_memory, ChunkUsers::kSessions)) << sequences;
    EXPECT_EQ(plan.host_memory % plan.host_chunk, 0u);
    // A container's chunks are smaller, and leave more over at their ends.
    SizeQuestion of_container = question;
    of_container.host_chunk_bytes = 128ull << 20;
    EXPECT_EQ(plan.worker_gib,
              (PlanSize(of_container)->host_memory + kDeviceBytes - 1) / kDeviceBytes);
  }
}

TEST(SizePlan, RefusesWhatTheDaemonWould) {
  const auto message = [](const SizeQuestion& question) {
    const auto plan = PlanSize(question);
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(plan.status().message());
  };
  SizeQuestion question = SmallQuestion();
  question.host_chunk_bytes = 4096;
  EXPECT_THAT(message(question), HasSubstr("host-chunk"));
  question = SmallQuestion();
  question.workers = 6;
  EXPECT_THAT(message(question), HasSubstr("5 sequences of 6 workers"));
  question = SmallQuestion();
  question.shape.head_dim = 65;
  EXPECT_THAT(message(question), HasSubstr("head_dim"));
  question = SmallQuestion();
  question.method.cache_tokens = 1;
  EXPECT_THAT(message(question), HasSubstr("cache_tokens"));
}

}  // namespace
}  // namespace clusterkv::service
