// What is CUDA's own: memory that goes to another process, streams of the caller's, pointers that
// the device does not reach. Skipped where there is no device.
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <numeric>
#include <vector>

#include "gpu/cluster_ops.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "tests/gpu/test_sequence.h"

namespace clusterkv::gpu {
namespace {

class CudaDevice : public testing::Test {
 protected:
  void SetUp() override {
    auto device = CreateDevice({.backend = "cuda"});
    if (absl::IsUnavailable(device.status()) && std::getenv("CLUSTERKV_REQUIRE_CUDA") == nullptr) {
      GTEST_SKIP() << device.status();
    }
    ASSERT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
    stream_ = *device_->CreateStream("test");
  }

  std::vector<uint32_t> Read(const DeviceMemory& memory, size_t count) {
    std::vector<uint32_t> words(count, 0xa5a5a5a5);
    EXPECT_TRUE(stream_->CopyAsync(words.data(), memory.data(), count * 4).ok());
    EXPECT_TRUE(stream_->Synchronize().ok());
    return words;
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

TEST_F(CudaDevice, SharesMemoryByADescriptor) {
  constexpr size_t kBytes = 5 << 20;
  auto shared = device_->AllocateShared(kBytes);
  ASSERT_TRUE(shared.ok()) << shared.status();
  EXPECT_EQ(Read(**shared, 1024), std::vector<uint32_t>(1024, 0));
  auto fd = (*shared)->Export();
  ASSERT_TRUE(fd.ok()) << fd.status();
  auto imported = device_->Import(*std::move(fd), kBytes);
  ASSERT_TRUE(imported.ok()) << imported.status();
  std::vector<uint32_t> words(1024);
  std::iota(words.begin(), words.end(), 7);
  ASSERT_TRUE(stream_->CopyAsync((*shared)->data(), words.data(), 4096).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(Read(**imported, 1024), words);
  shared->reset();
  EXPECT_EQ(Read(**imported, 1024), words) << "an importer's mapping outlives the exporter's";
  EXPECT_FALSE((*imported)->Export().ok());
}

TEST_F(CudaDevice, SharesMemoryByALegacyHandleInASealedFile) {
  auto legacy = CreateDevice({.backend = "cuda", .gpu_sharing = GpuSharing::kLegacy});
  ASSERT_TRUE(legacy.ok()) << legacy.status();
  EXPECT_TRUE(device_->counts_importers());
  EXPECT_FALSE((*legacy)->counts_importers());
  auto shared = (*legacy)->AllocateShared(4096);
  ASSERT_TRUE(shared.ok()) << shared.status();
  EXPECT_EQ(Read(**shared, 1024), std::vector<uint32_t>(1024, 0));
  const std::vector<uint32_t> words(1024, 7);
  ASSERT_TRUE(stream_->CopyAsync((*shared)->data(), words.data(), 4096).ok());
  ASSERT_TRUE(stream_->Synchronize().ok());
  ASSERT_TRUE((*shared)->Clear().ok());
  EXPECT_EQ(Read(**shared, 1024), std::vector<uint32_t>(1024, 0));
  auto fd = (*shared)->Export();
  ASSERT_TRUE(fd.ok()) << fd.status();
  EXPECT_NE(fcntl(fd->get(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_NE(fcntl(fd->get(), F_GET_SEALS) & F_SEAL_WRITE, 0);
  // A handle opens in another process only; which device imports does not matter.
  UniqueFd copy(dup(fd->get()));
  EXPECT_EQ(device_->Import(*std::move(fd), 4096).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(device_->Import(std::move(copy), 8192).status().code(),
            absl::StatusCode::kInvalidArgument)
      << "longer than it is";
}

TEST_F(CudaDevice, RefusesToMapMoreThanWasExported) {
  auto shared = device_->AllocateShared(1 << 20);
  ASSERT_TRUE(shared.ok()) << shared.status();
  auto fd = (*shared)->Export();
  ASSERT_TRUE(fd.ok()) << fd.status();
  const auto longer = device_->Import(*std::move(fd), 64 << 20);
  EXPECT_EQ(longer.status().code(), absl::StatusCode::kInvalidArgument) << longer.status();
  EXPECT_EQ(device_->Import(UniqueFd(), 4096).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(CudaDevice, IsExhaustedByMoreThanItHas) {
  EXPECT_EQ(device_->Allocate(size_t{1} << 42).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(device_->AllocateShared(size_t{1} << 42).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(device_->Allocate(4096).ok()) << "and works on";
}

TEST_F(CudaDevice, GivesSharedMemoryBackToTheDriver) {
  size_t before = 0, held = 0, after = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
  auto shared = device_->AllocateShared(1 << 30);
  ASSERT_TRUE(shared.ok()) << shared.status();
  ASSERT_EQ(cudaMemGetInfo(&held, &total), cudaSuccess);
  EXPECT_LE(held + (1 << 30), before);
  shared->reset();
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  EXPECT_GE(after, before);
}

TEST_F(CudaDevice, EnqueuesOnTheCallersStream) {
  cudaStream_t native = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking), cudaSuccess);
  {
    auto wrapped = device_->WrapStream(native);
    ASSERT_TRUE(wrapped.ok()) << wrapped.status();
    auto memory = device_->AllocatePinned(4096);
    ASSERT_TRUE(memory.ok()) << memory.status();
    std::vector<uint32_t> words(1024, 3);
    ASSERT_TRUE((*wrapped)->CopyAsync((*memory)->data(), words.data(), 4096).ok());
    ASSERT_EQ(cudaStreamSynchronize(native), cudaSuccess);
    EXPECT_EQ(reinterpret_cast<uint32_t*>((*memory)->data())[1023], 3u);
    auto event = (*wrapped)->Record();
    ASSERT_TRUE(event.ok()) << event.status();
    EXPECT_TRUE((*event)->Wait(absl::Seconds(10)).ok());
    EXPECT_TRUE((*event)->done());
  }
  EXPECT_EQ(cudaStreamDestroy(native), cudaSuccess) << "it stays the caller's";
}

Scenario TinyScenario(DType dtype) {
  Scenario scenario;
  scenario.shape = {.layers = 1, .kv_heads = 1, .q_heads = 2, .head_dim = 64, .dtype = dtype};
  scenario.method.tokens_per_cluster = 4;
  scenario.method.budget_tokens = 16;
  scenario.max_tokens = 400;
  return scenario;
}

TEST_F(CudaDevice, RefusesPageableTensors) {
  TestSequence sequence(*device_, *stream_, TinyScenario(DType::kFp16), 1);
  const BatchSlot slot = sequence.slot();
  const Batch batch(&slot, 1);
  std::vector<std::byte> pageable(4096);
  TestBuffer good(*device_, *stream_, 4096);
  DecodeOps& ops = device_->decode_ops();
  const auto expect_refused = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  };
  expect_refused(
      ops.Append(*stream_, batch, 0, {.k = good.data(), .v = pageable.data(), .head_stride = 128}));
  expect_refused(ops.Select(*stream_, batch, 0, {.q = pageable.data(), .head_stride = 128}, 16));
  expect_refused(ops.Attend(*stream_, batch, 0, {.q = good.data(), .head_stride = 128},
                            {.out = reinterpret_cast<float*>(pageable.data()), .head_stride = 64}));
  EXPECT_TRUE(stream_->Synchronize().ok()) << "nothing was enqueued";
}

TEST_F(CudaDevice, RefusesStorageInFp32) {
  const Scenario scenario = TinyScenario(DType::kFp32);
  const auto layout = StateLayout::Create(scenario.shape, scenario.method.Resolved(scenario.shape),
                                          scenario.max_tokens);
  ASSERT_TRUE(layout.ok()) << layout.status();
  TestBuffer state(*device_, *stream_, layout->total_bytes);
  EXPECT_EQ(device_->cluster_ops().Initialize(*stream_, state.data(), *layout, 1).code(),
            absl::StatusCode::kInvalidArgument);
}

// Design D11: a captured step replays rightly while segments are published and the batch changes.
TEST_F(CudaDevice, CapturedStepFollowsTheBatch) {
  cudaStream_t native = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking), cudaSuccess);
  std::unique_ptr<Stream> stream = *device_->WrapStream(native);
  TestSequence a(*device_, *stream, TinyScenario(DType::kBf16), 1);
  TestSequence b(*device_, *stream, TinyScenario(DType::kBf16), 2);
  for (TestSequence* sequence : {&a, &b}) {
    sequence->IngestPrompt(200);
    sequence->PublishComplete();
  }
  TestBuffer queries(*device_, *stream, 4 * 128), kv(*device_, *stream, 4 * 128);
  TestBuffer out(*device_, *stream, 2 * 2 * 64 * 4);
  auto errors = *device_->AllocatePinned(8);
  const QuerySource q = {.q = queries.data(), .batch_stride = 256, .head_stride = 128};
  const KvSource token = {
      .k = kv.data(), .v = kv.data() + 256, .batch_stride = 128, .head_stride = 128};
  const AttentionTarget target = {
      .out = reinterpret_cast<float*>(out.data()), .batch_stride = 128, .head_stride = 64};
  const absl::Span<uint32_t> found(reinterpret_cast<uint32_t*>(errors->data()), 2);
  std::vector<BatchSlot> batch = {a.slot(), b.slot()};
  batch[1].active = 0;
  DecodeOps& ops = device_->decode_ops();
  ASSERT_TRUE(ops.LoadBatch(*stream, batch).ok());
  ASSERT_EQ(cudaStreamBeginCapture(native, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_TRUE(ops.BeginStep(*stream, batch).ok());
  ASSERT_TRUE(ops.Append(*stream, batch, 0, token).ok());
  ASSERT_TRUE(ops.Select(*stream, batch, 0, q, 16).ok());
  ASSERT_TRUE(ops.Fetch(*stream, batch, 0).ok());
  ASSERT_TRUE(ops.Attend(*stream, batch, 0, q, target).ok());
  ASSERT_TRUE(ops.EndStep(*stream, batch, found).ok());
  std::vector<BatchSlot> other = batch;
  other[1].active = 1;
  EXPECT_EQ(ops.BeginStep(*stream, other).code(), absl::StatusCode::kFailedPrecondition)
      << "a graph would load this batch at every replay";
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(native, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);

  const auto latch = [&](TestSequence& sequence) {
    return sequence.state().Download<StepLatch>(sequence.layout().latch, 1)[0];
  };
  const auto replay = [&] {
    ASSERT_EQ(cudaGraphLaunch(exec, native), cudaSuccess);
    ASSERT_TRUE(stream->Synchronize().ok());
  };
  replay();
  EXPECT_EQ(latch(a).length, 201u);
  EXPECT_EQ(latch(b).length, 200u) << "inactive";
  ASSERT_TRUE(ops.LoadBatch(*stream, other).ok());
  replay();
  EXPECT_EQ(latch(a).length, 202u);
  EXPECT_EQ(latch(b).length, 201u) << "it has joined";
  const uint32_t segments = latch(b).segments;
  b.length = 200 + 320 + 1;
  b.Publish({b.cut(), b.cut() + 16});
  other[0].generation = 9;  // left, and its memory is another's
  ASSERT_TRUE(ops.LoadBatch(*stream, other).ok());
  replay();
  EXPECT_EQ(latch(b).segments, segments + 1) << "published meanwhile";
  EXPECT_EQ(found[0], uint32_t{kStaleGeneration});
  EXPECT_EQ(found[1], 0u);
  const auto outputs = out.Download<float>(0, 128);
  EXPECT_EQ(outputs, std::vector<float>(128, 0.0f)) << "of a stale slot zeros";
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  stream.reset();
  cudaStreamDestroy(native);
}

}  // namespace
}  // namespace clusterkv::gpu
