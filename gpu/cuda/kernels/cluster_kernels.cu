// Staging, permuting and publishing: each moves bytes once, 16 at a time, as fast as the slower of
// HBM and PCIe allows.
#include "gpu/cuda/kernels/cluster_kernels.h"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / 32;
constexpr uint32_t kTokensPerBlock = 64;

__global__ void InitializeKernel(std::byte* state, const __grid_constant__ StateBlock block) {
  const DeviceSlot slot = {.state = state, .block = block};
  const DeviceState view(slot);
  uint32_t* const free_slots = view.free_slots(blockIdx.x);
  // The stack's top is its end: slots go out from 0 on.
  for (uint32_t i = threadIdx.x; i < block.cache_tokens; i += kThreads) {
    free_slots[i] = block.cache_tokens - 1 - i;
  }
  if (threadIdx.x == 0) view.free_count(blockIdx.x) = block.cache_tokens;
}

__global__ void FinishInitializeKernel(std::byte* state, const __grid_constant__ StateBlock block,
                                       uint32_t generation) {
  const DeviceSlot slot = {.state = state, .block = block};
  const DeviceState view(slot);
  view.latch().cut = block.sink_tokens;
  view.header().magic = kStateMagic;
  view.header().version = block.version;
  // Last: with the generation the block is a sequence's.
  const ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_system> own(view.header().generation);
  own.store(generation, ::cuda::memory_order_release);
}

// Blocks (tokens, layer and head). K and V lie apart in the ring and side by side in a row.
__global__ void StageKernel(const __grid_constant__ StageLaunch args) {
  const uint32_t half = args.head_dim * 2;
  const size_t token = size_t{half} * args.kv_heads;
  const uint32_t layer = blockIdx.y / args.kv_heads, head = blockIdx.y % args.kv_heads;
  const size_t plane = args.range_tokens * token;
  const std::byte* const k =
      args.range + layer * args.layer_stride + args.first_token * token + head * half;
  std::byte* const rows =
      args.destinations != nullptr ? args.destinations[blockIdx.y] : args.few[blockIdx.y];
  const uint32_t half_words = half / 16;
  const uint32_t begin = blockIdx.x * kTokensPerBlock;
  const uint32_t count = min(kTokensPerBlock, args.count - begin);
  for (uint32_t i = threadIdx.x; i < count * 2 * half_words; i += kThreads) {
    const uint32_t t = begin + i / (2 * half_words), word = i % (2 * half_words);
    const bool v = word >= half_words;
    const auto* const from =
        reinterpret_cast<const uint4*>(k + t * token + (v ? plane : 0)) + word % half_words;
    reinterpret_cast<uint4*>(rows + size_t{t} * 2 * half)[word] = *from;
  }
}

__global__ void GatherKernel(const GatherProblem* problems, uint32_t row_bytes, uint32_t* fault) {
  const GatherProblem problem = problems[blockIdx.y];
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t end = min(problem.tokens, (blockIdx.x + 1) * kTokensPerBlock);
  // Positions may lie beyond PCIe: a warp's go together.
  const uint32_t own = blockIdx.x * kTokensPerBlock + threadIdx.x;
  if (threadIdx.x < kTokensPerBlock && own < end) {
    problem.positions[own] = problem.first_position + problem.order[own];
  }
  for (uint32_t i = blockIdx.x * kTokensPerBlock + threadIdx.x / 32; i < end; i += kWarps) {
    const uint32_t source = problem.order[i];
    if (source >= problem.tokens) {
      if (lane == 0) Report(fault, KernelFault::kOrderOutsideRun, source);
      continue;
    }
    const auto* const from =
        reinterpret_cast<const uint4*>(problem.rows + size_t{source} * row_bytes);
    auto* const to = reinterpret_cast<uint4*>(problem.target + size_t{i} * row_bytes);
    for (uint32_t word = lane; word < row_bytes / 16; word += 32) to[word] = from[word];
  }
}

// One block a (layer, KV head).
__global__ void PublishMetadataKernel(const __grid_constant__ PublishLaunch args) {
  __shared__ uint32_t warp_sums[kWarps];
  const DeviceSlot slot = {.state = args.state, .block = args.block};
  const DeviceState view(slot);
  const size_t head = blockIdx.x;
  const PublishHead problem = args.heads[head];
  const uint32_t first_row = args.segment_begin - args.block.sink_tokens;
  const uint32_t segment_tokens = args.segment_end - args.segment_begin;
  const auto row_units = static_cast<uint32_t>(view.row_bytes() / 16);
  ClusterEntry* const entries = view.clusters(head) + problem.cluster_begin;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t total = 0;
  bool valid = true;
  for (uint32_t begin = 0; begin < problem.cluster_count; begin += kThreads) {
    const uint32_t c = begin + threadIdx.x;
    const uint32_t size = c < problem.cluster_count ? problem.sizes[c] : 0;
    if (c < problem.cluster_count && (size == 0 || size > segment_tokens)) valid = false;
    uint32_t sum = size;
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    uint32_t before = total + sum - size;
    for (uint32_t w = 0; w < kWarps; ++w) {
      if (w < warp) before += warp_sums[w];
      total += warp_sums[w];
    }
    // An invalid segment is never published, and its entries are written again.
    if (c < problem.cluster_count) {
      entries[c] = {.first_row = first_row + before,
                    .tokens = size,
                    .chunk = problem.chunk,
                    .chunk_offset = problem.rows_offset + before * row_units};
    }
  }
  if (!valid || total != segment_tokens) atomicOr(args.invalid, 1u);
  const auto words = static_cast<uint32_t>(problem.cluster_count * view.mean_bytes() / 16);
  const size_t offset = problem.cluster_begin * view.mean_bytes();
  auto* const centroids = reinterpret_cast<uint4*>(view.centroids(head) + offset);
  auto* const value_means = reinterpret_cast<uint4*>(view.value_means(head) + offset);
  for (uint32_t i = threadIdx.x; i < words; i += kThreads) {
    centroids[i] = reinterpret_cast<const uint4*>(problem.centroids)[i];
    value_means[i] = reinterpret_cast<const uint4*>(problem.value_means)[i];
  }
  if (threadIdx.x == 0) {
    view.segment_runs(head)[args.segment] = {
        .cluster_end = problem.cluster_begin + problem.cluster_count,
        .chunk = problem.chunk,
        .positions_offset = problem.positions_offset,
        .first_row = first_row};
  }
}

__global__ void PublishCountKernel(const __grid_constant__ PublishLaunch args, uint32_t* fault) {
  if (*args.invalid != 0) {
    Report(fault, KernelFault::kSizesDoNotAddUp, args.segment);
    return;
  }
  const DeviceSlot slot = {.state = args.state, .block = args.block};
  const DeviceState view(slot);
  view.segment_ends()[args.segment] = args.segment_end;
  const ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_system> published(
      *view.published_segments());
  published.store(args.segment + 1, ::cuda::memory_order_release);
}

}  // namespace

cudaError_t LaunchInitialize(std::byte* state, const StateBlock& block, uint32_t generation,
                             cudaStream_t stream) {
  InitializeKernel<<<block.layers * block.kv_heads, kThreads, 0, stream>>>(state, block);
  FinishInitializeKernel<<<1, 1, 0, stream>>>(state, block, generation);
  return cudaGetLastError();
}

cudaError_t LaunchStage(const StageLaunch& args, cudaStream_t stream) {
  if (args.count == 0 || args.layer_count == 0) return cudaSuccess;
  const dim3 grid((args.count + kTokensPerBlock - 1) / kTokensPerBlock,
                  args.layer_count * args.kv_heads);
  StageKernel<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchGather(const GatherProblem* problems, uint32_t count, uint32_t most_tokens,
                         uint32_t row_bytes, uint32_t* fault, cudaStream_t stream) {
  if (count == 0 || most_tokens == 0) return cudaSuccess;
  const dim3 grid((most_tokens + kTokensPerBlock - 1) / kTokensPerBlock, count);
  GatherKernel<<<grid, kThreads, 0, stream>>>(problems, row_bytes, fault);
  return cudaGetLastError();
}

cudaError_t LaunchPublish(const PublishLaunch& args, uint32_t* fault, cudaStream_t stream) {
  const uint32_t heads = args.block.layers * args.block.kv_heads;
  PublishMetadataKernel<<<heads, kThreads, 0, stream>>>(args);
  PublishCountKernel<<<1, 1, 0, stream>>>(args, fault);
  return cudaGetLastError();
}

}  // namespace clusterkv::gpu::cuda
