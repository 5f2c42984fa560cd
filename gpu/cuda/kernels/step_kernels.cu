// A step's bookkeeping: the batch's table, the latch (design D3), and new tokens on their way to
// sinks, window and ingest ring. All of it moves a few kilobytes: latency is the cost.
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/overlapped_launch.cuh"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kThreads = 256;

// `bytes` is a multiple of 64; 16 at a time where both sides allow it.
__device__ void CopyHalfRow(std::byte* to, const std::byte* from, uint32_t bytes, uint32_t lane,
                            uint32_t lanes) {
  if (((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15) == 0) {
    for (uint32_t i = lane * 16; i < bytes; i += lanes * 16) {
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    }
    return;
  }
  for (uint32_t i = lane * 2; i < bytes; i += lanes * 2) {
    *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
  }
}

__global__ void LoadBatchKernel(const __grid_constant__ LoadBatchArgs args) {
  if (threadIdx.x == 0) {
    args.table->count = args.total;
    args.table->scratch = args.scratch;
  }
  const auto* const words = reinterpret_cast<const uint32_t*>(args.slots);
  auto* const target = reinterpret_cast<uint32_t*>(args.table->slots + args.first);
  const uint32_t count = args.count * static_cast<uint32_t>(sizeof(DeviceSlot) / 4);
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) target[i] = words[i];
}

// One block a slot.
__global__ void BeginStepKernel(const BatchTable* table) {
  FollowPredecessor();
  const DeviceSlot* const slot = ActiveSlot(table, blockIdx.x);
  if (slot == nullptr) return;
  const DeviceState state(*slot);
  if (!state.IsCurrent()) return;
  const StateBlock& block = state.block();
  StepLatch& latch = state.latch();
  __shared__ uint32_t segments;
  if (threadIdx.x == 0) {
    // Acquire: what was published with the count is seen by all that follows in this step.
    const ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_system> published(
        *state.published_segments());
    segments = min(published.load(::cuda::memory_order_acquire), block.max_segments);
  }
  __syncthreads();
  // The chunks of those segments were mapped before they were published.
  const DecodeScratch& scratch = table->scratch;
  const uint32_t chunks = min(slot->chunk_count, scratch.chunk_stride);
  for (uint32_t i = threadIdx.x; i < chunks; i += blockDim.x) {
    scratch.chunks[size_t{blockIdx.x} * scratch.chunk_stride + i] =
        LoadHostChunk(slot->host_chunks, i);
  }
  if (threadIdx.x != 0) return;
  latch.segments = segments;
  latch.cut = segments == 0 ? block.sink_tokens : state.segment_ends()[segments - 1];
  ++latch.length;
  ++latch.step;
  if (chunks > 0) scratch.chunk_steps[blockIdx.x] = make_uint2(slot->generation, latch.step);
  const uint32_t begin = max(latch.cut, block.sink_tokens);
  if (latch.length > begin && latch.length - begin > block.window_slots) {
    latch.errors |= kWindowOverflow;
  }
}

// One block a (KV head, slot).
__global__ void AppendKernel(const BatchTable* table, uint32_t layer, TokenSource source) {
  FollowPredecessor();
  const DeviceSlot* const slot = ActiveSlot(table, blockIdx.y);
  if (slot == nullptr) return;
  const DeviceState state(*slot);
  if (!state.IsCurrent()) return;
  const uint32_t kv_head = blockIdx.x;
  const uint32_t length = state.latch().length;
  if (kv_head >= state.block().kv_heads || length == 0) return;
  const auto half = static_cast<uint32_t>(state.mean_bytes());
  const uint64_t offset = blockIdx.y * source.batch_stride + kv_head * source.head_stride;
  std::byte* const row = state.token_row(HeadIndex(state.block(), layer, kv_head), length - 1);
  CopyHalfRow(row, source.k + offset, half, threadIdx.x, blockDim.x);
  CopyHalfRow(row + half, source.v + offset, half, threadIdx.x, blockDim.x);
  if (slot->tail == nullptr) return;
  std::byte* const tail = slot->tail + 2 * layer * slot->tail_stride + kv_head * half;
  CopyHalfRow(tail, source.k + offset, half, threadIdx.x, blockDim.x);
  CopyHalfRow(tail + slot->tail_stride, source.v + offset, half, threadIdx.x, blockDim.x);
}

// Errors of the step so far, which are cleared. The block may be another sequence's by now: only
// its own slot may clear its errors.
__device__ uint32_t TakeErrors(const DeviceState& state) {
  if (!state.IsCurrent()) return kStaleGeneration;
  const uint32_t errors = state.latch().errors;
  state.latch().errors = 0;
  return errors;
}

__global__ void EndStepKernel(const BatchTable* table, uint32_t* errors, uint32_t count) {
  FollowPredecessor();
  const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const DeviceSlot* const slot = ActiveSlot(table, index);
  errors[index] = slot != nullptr ? TakeErrors(DeviceState(*slot)) : 0;
}

__global__ void ReportLayerKernel(const BatchTable* table, uint32_t layer, LayerReport* reports,
                                  uint32_t count) {
  FollowPredecessor();
  const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= count) return;
  LayerReport report = {};
  if (const DeviceSlot* const slot = ActiveSlot(table, index)) {
    const DeviceState state(*slot);
    report.errors = TakeErrors(state);
    if (state.IsCurrent()) {
      report.cut = state.latch().cut;
      report.counters = state.counters(layer);
    }
  }
  reports[index] = report;
}

// One block a (token, layer). Of the tokens that would share a window slot only the newest is
// written. The last block to leave sets the length, so that one launch suffices.
__global__ void WriteTokensKernel(const __grid_constant__ WriteTokensLaunch args, uint32_t first,
                                  uint32_t sinks) {
  const DeviceState state(args.slot);
  if (!state.IsCurrent()) return;
  const StateBlock& block = state.block();
  // The grid covers the sinks of the range, then what the window can hold.
  const uint32_t position =
      blockIdx.x < sinks ? args.position + blockIdx.x : first + (blockIdx.x - sinks);
  const uint32_t layer = args.layer_begin + blockIdx.y;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0 && args.length_after != 0) {
    state.latch().length = args.length_after;
  }
  if (blockIdx.y >= args.layer_count || position >= args.position + args.count) return;
  const auto half = static_cast<uint32_t>(state.mean_bytes());
  const uint64_t base =
      blockIdx.y * args.source.layer_stride + (position - args.position) * args.source.token_stride;
  const uint32_t warps = blockDim.x / 32;
  for (uint32_t kv_head = threadIdx.x / 32; kv_head < block.kv_heads; kv_head += warps) {
    const uint64_t offset = base + kv_head * args.source.head_stride;
    std::byte* const row = state.token_row(HeadIndex(block, layer, kv_head), position);
    CopyHalfRow(row, args.source.k + offset, half, threadIdx.x % 32, 32);
    CopyHalfRow(row + half, args.source.v + offset, half, threadIdx.x % 32, 32);
  }
}

}  // namespace

cudaError_t LaunchLoadBatch(const LoadBatchArgs& args, cudaStream_t stream) {
  LoadBatchKernel<<<1, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchBeginStep(const BatchShape& shape, cudaStream_t stream) {
  return LaunchOverlapped(shape.overlap, BeginStepKernel, shape.count, 64, 0, stream, shape.table);
}

cudaError_t LaunchAppend(const BatchShape& shape, uint32_t layer, const TokenSource& source,
                         cudaStream_t stream) {
  const dim3 grid(shape.kv_heads, shape.count);
  return LaunchOverlapped(shape.overlap, AppendKernel, grid, 32, 0, stream, shape.table, layer,
                          source);
}

cudaError_t LaunchEndStep(const BatchShape& shape, uint32_t* errors, cudaStream_t stream) {
  return LaunchOverlapped(shape.overlap, EndStepKernel, (shape.count + 31) / 32, 32, 0, stream,
                          shape.table, errors, shape.count);
}

cudaError_t LaunchReportLayer(const BatchShape& shape, uint32_t layer, LayerReport* reports,
                              cudaStream_t stream) {
  return LaunchOverlapped(shape.overlap, ReportLayerKernel, (shape.count + 31) / 32, 32, 0, stream,
                          shape.table, layer, reports, shape.count);
}

cudaError_t LaunchWriteTokens(const WriteTokensLaunch& args, cudaStream_t stream) {
  const StateBlock& block = args.slot.block;
  const uint32_t end = args.position + args.count;
  const uint32_t sinks = args.position < block.sink_tokens
                             ? (end < block.sink_tokens ? end : block.sink_tokens) - args.position
                             : 0;
  uint32_t first = args.position + sinks;
  const uint32_t newest = end > block.window_slots ? end - block.window_slots : 0;
  if (first < newest) first = newest;
  const uint32_t tokens = sinks + (end > first ? end - first : 0);
  const dim3 grid(tokens > 0 ? tokens : 1, args.layer_count > 0 ? args.layer_count : 1);
  WriteTokensKernel<<<grid, kThreads, 0, stream>>>(args, first, sinks);
  return cudaGetLastError();
}

}  // namespace clusterkv::gpu::cuda
