// A step of all layers captured in one CUDA graph and replayed, beside the same steps enqueued one
// by one: the same sequence twice, with segments published between the steps. Needs a GPU.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "client/client.h"
#include "client/replay/private_daemon.h"
#include "tests/gpu/seed.h"
#include "tests/integration/dense_sequence.h"

namespace clusterkv {
namespace {

using client::Client;
using client::DecodeBatch;
using client::Sequence;
using testing::DenseSequence;

constexpr uint32_t kPrompt = 600;
constexpr uint32_t kSteps = 150;

class CudaGraph : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      (void)cudaGetLastError();
      ASSERT_EQ(std::getenv("CLUSTERKV_REQUIRE_CUDA"), nullptr);
      GTEST_SKIP() << "no GPU";
    }
    const char* const program = std::getenv("CLUSTERKV_TEST_CLUSTERKVD");
    auto daemon = client::replay::PrivateDaemon::Start(
        {.program = program == nullptr ? CLUSTERKVD_PATH : program,
         .backend = "cuda",
         .memory = {.total_bytes = 256ull << 20}});
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    auto client = Client::Connect({.address = daemon_->address(), .name = "cuda_graph_test"});
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    shape_ = {.layers = 2, .kv_heads = 2, .q_heads = 6, .head_dim = 64, .dtype = gpu::DType::kFp16};
    method_.decode_segment_tokens = 32;
    method_.prompt_segment_tokens = 256;
    method_.tokens_per_cluster = 8;
    method_.budget_tokens = 100;
    method_.min_window_tokens = 16;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }

  void TearDown() override {
    client_.reset();
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    if (daemon_ == nullptr) return;
    EXPECT_TRUE(daemon_->Stop().ok());
  }

  std::unique_ptr<Sequence> Prefilled(const DenseSequence& dense) {
    auto sequence = client_->RegisterSequence(
        {.shape = shape_, .method = method_, .max_tokens = kPrompt + kSteps + 1});
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    const auto k = dense.Keys(0, shape_.layers, 0, kPrompt);
    const auto v = dense.Values(0, shape_.layers, 0, kPrompt);
    const size_t head = shape_.row_bytes() / 2;
    EXPECT_TRUE(
        (*sequence)
            ->Ingest({.count = kPrompt, .layer_count = shape_.layers, .end_of_prompt = true},
                     {.k = k.data(),
                      .v = v.data(),
                      .layer_stride = kPrompt * shape_.kv_heads * head,
                      .token_stride = shape_.kv_heads * head,
                      .head_stride = head})
            .ok());
    return *std::move(sequence);
  }

  std::unique_ptr<gpu::DeviceMemory> Pinned(size_t bytes) {
    auto memory = client_->device().AllocatePinned(bytes);
    EXPECT_TRUE(memory.ok()) << memory.status();
    return *std::move(memory);
  }

  // One layer's calls; all tensors lie in `tensors_`.
  absl::Status Layer(DecodeBatch& batch, uint32_t layer, float* out) {
    const size_t head = shape_.row_bytes() / 2;
    const size_t kv = shape_.kv_heads * head;
    std::byte* const base = tensors_->data() + layer * (2 * kv + shape_.q_heads * head);
    const absl::Status appended =
        batch.Append(layer, {.k = base, .v = base + kv, .head_stride = head});
    if (!appended.ok()) return appended;
    return batch.Attend(
        layer, {.q = base + 2 * kv, .head_stride = head},
        {.out = out + layer * shape_.q_heads * shape_.head_dim, .head_stride = shape_.head_dim});
  }

  gpu::Shape shape_;
  gpu::MethodOptions method_;
  std::unique_ptr<client::replay::PrivateDaemon> daemon_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<gpu::DeviceMemory> tensors_;
  cudaStream_t stream_ = nullptr;
};

TEST_F(CudaGraph, ReplaysWhatSingleStepsDo) {
  std::mt19937_64 random(gpu::TestSeed());
  SCOPED_TRACE(gpu::SeedTrace(gpu::TestSeed()));
  DenseSequence dense(shape_);
  dense.AddTokens(kPrompt, random);
  const std::unique_ptr<Sequence> replayed = Prefilled(dense), stepped = Prefilled(dense);
  auto graph_batch = client_->CreateBatch({replayed.get()}, {.stream = stream_, .captured = true});
  ASSERT_TRUE(graph_batch.ok()) << graph_batch.status();
  auto step_batch = client_->CreateBatch({stepped.get()}, {.stream = stream_});
  ASSERT_TRUE(step_batch.ok()) << step_batch.status();
  DecodeBatch& captured = **graph_batch;
  DecodeBatch& plain = **step_batch;

  EXPECT_TRUE(absl::IsFailedPrecondition(plain.Prepare()));
  EXPECT_TRUE(absl::IsFailedPrecondition(captured.Complete()));
  EXPECT_TRUE(absl::IsFailedPrecondition(captured.Begin())) << "not prepared";

  const size_t out_floats = size_t{shape_.layers} * shape_.q_heads * shape_.head_dim;
  tensors_ = Pinned(size_t{shape_.layers} * (2 * shape_.kv_heads + shape_.q_heads) *
                    shape_.row_bytes() / 2);
  const auto graph_out = Pinned(out_floats * 4), step_out = Pinned(out_floats * 4);
  auto* const from_graph = reinterpret_cast<float*>(graph_out->data());
  auto* const from_steps = reinterpret_cast<float*>(step_out->data());
  cudaGraphExec_t exec = nullptr;
  for (uint32_t step = 0; step < kSteps; ++step) {
    for (Sequence* sequence : {replayed.get(), stepped.get()}) {
      ASSERT_TRUE(sequence->WaitPublished(kPrompt + step).ok());
    }
    ASSERT_EQ(replayed->published().cut, stepped->published().cut);
    dense.AddTokens(1, random);
    std::byte* place = tensors_->data();
    const auto put = [&](const std::vector<std::byte>& bytes) {
      place = std::ranges::copy(bytes, place).out;
    };
    std::vector<std::vector<std::byte>> queries;
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
      put(dense.Keys(layer, 1, kPrompt + step, 1));
      put(dense.Values(layer, 1, kPrompt + step, 1));
      queries.push_back(dense.RandomQuery(random));
      put(queries.back());
    }
    ASSERT_TRUE(captured.Prepare().ok());
    if (exec == nullptr) {
      ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
      ASSERT_TRUE(captured.Begin().ok());
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        ASSERT_TRUE(Layer(captured, layer, from_graph).ok());
      }
      ASSERT_TRUE(captured.End().ok());
      cudaGraph_t graph = nullptr;
      ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
      ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
      cudaGraphDestroy(graph);
    }
    std::fill_n(from_graph, out_floats, NAN);
    ASSERT_EQ(cudaGraphLaunch(exec, stream_), cudaSuccess);
    const absl::Status completed = captured.Complete();
    ASSERT_TRUE(completed.ok()) << completed;

    ASSERT_TRUE(plain.Begin().ok());
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
      ASSERT_TRUE(Layer(plain, layer, from_steps).ok());
    }
    ASSERT_TRUE(plain.End().ok());
    ASSERT_TRUE(std::equal(from_graph, from_graph + out_floats, from_steps)) << "step " << step;
    ASSERT_EQ(replayed->length(), kPrompt + step + 1);
  }
  EXPECT_GT(replayed->published().segments, 4u) << "some were published between the replays";
  EXPECT_GT(replayed->counters(0).hit_clusters, 0u);
  EXPECT_EQ(replayed->counters(0).hit_clusters, stepped->counters(0).hit_clusters);
  EXPECT_TRUE(absl::IsFailedPrecondition(captured.Prepare(50))) << "another budget";
  cudaGraphExecDestroy(exec);
  graph_batch->reset();
  step_batch->reset();
}

}  // namespace
}  // namespace clusterkv
