// Grouping: a stable counting sort of a problem's tokens by label, one block a problem.
//
//   1  each warp counts the labels of its own run of tokens            histogram [warp][cluster]
//   2  over clusters, begins; over warps, where each warp's part of a cluster begins
//   3  each warp places its tokens, 32 at a time, equal labels by lane
//
// Cost: the labels are read twice. Histograms are in shared memory up to kSharedClusters, else in
// the workspace. A problem of which no label changed is done here, its last grouping stands.
#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_block.cuh"

namespace clusterkv::gpu::cuda::kmeans {
namespace {

// 16-bit entries in pairs, so that 32-bit atomics can add to them: a run is at most 2,048 tokens
// (65,536 of 32 warps), or 8,192 of 8. Generic addresses: shared or global.
class Histograms {
 public:
  __device__ Histograms(uint16_t* entries, uint32_t clusters)
      : entries_(entries), stride_((clusters + 1) / 2 * 2) {}

  __device__ uint16_t& At(uint32_t warp, uint32_t cluster) const {
    return entries_[warp * stride_ + cluster];
  }
  __device__ void Clear(uint32_t warps) const {
    auto* words = reinterpret_cast<uint32_t*>(entries_);
    for (uint32_t i = threadIdx.x; i < warps * stride_ / 2; i += blockDim.x) words[i] = 0;
  }
  __device__ void Count(uint32_t warp, uint32_t cluster) const {
    auto* words = reinterpret_cast<uint32_t*>(entries_);
    atomicAdd(words + (warp * stride_ + cluster) / 2, cluster % 2 == 0 ? 1u : 1u << 16);
  }

 private:
  uint16_t* entries_;
  uint32_t stride_;
};

// Counts become places: of the first token of a cluster among a warp's. A place is below 65,536;
// it may become so, and 0, only when the last token has taken it.
__device__ void ScanClusters(const Histograms& histograms, const Problem& problem, uint32_t warps,
                             uint32_t* begins) {
  __shared__ uint32_t shared[32];
  uint32_t before = 0;
  for (uint32_t base = 0; base < problem.clusters; base += blockDim.x) {
    const uint32_t cluster = base + threadIdx.x;
    const bool inside = cluster < problem.clusters;
    uint32_t size = 0;
    for (uint32_t warp = 0; inside && warp < warps; ++warp) size += histograms.At(warp, cluster);
    uint32_t total;
    const uint32_t begin = before + BlockExclusiveSum(size, shared, total);
    before += total;
    if (!inside) continue;
    begins[cluster] = begin;
    uint32_t place = begin;
    for (uint32_t warp = 0; warp < warps; ++warp) {
      uint16_t& entry = histograms.At(warp, cluster);
      const uint32_t count = entry;
      entry = static_cast<uint16_t>(place);
      place += count;
    }
  }
  if (threadIdx.x == 0) begins[problem.clusters] = before;
}

__device__ void Place(const Histograms& histograms, const uint16_t* labels, uint32_t run_begin,
                      uint32_t run_end, uint16_t* members) {
  constexpr uint32_t kAhead = 4;  // labels on their way
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  for (uint32_t base = run_begin + lane; base - lane < run_end; base += 32 * kAhead) {
    uint32_t label[kAhead];
#pragma unroll
    for (uint32_t i = 0; i < kAhead; ++i) {
      label[i] = base + i * 32 < run_end ? __ldg(labels + base + i * 32) : kMaxTokens;
    }
#pragma unroll
    for (uint32_t i = 0; i < kAhead; ++i) {
      const bool inside = label[i] != kMaxTokens;
      const uint32_t equals = __match_any_sync(0xFFFFFFFFu, label[i]);
      const uint32_t rank = __popc(equals & ((1u << lane) - 1));
      uint32_t place = 0;
      if (inside) place = histograms.At(warp, label[i]);
      __syncwarp();
      if (inside && rank == 0) {
        histograms.At(warp, label[i]) = static_cast<uint16_t>(place + __popc(equals));
      }
      __syncwarp();
      if (inside) members[place + rank] = static_cast<uint16_t>(base + i * 32);
    }
  }
}

__global__ void __launch_bounds__(1024)
    GroupKernel(const __grid_constant__ Batch batch, bool first_time) {
  extern __shared__ uint32_t shared_histograms[];
  State& state = batch.states[blockIdx.x];
  if (state.done != 0) return;
  const bool changed = first_time || state.changed != 0;
  const uint32_t grouping = first_time ? 0 : changed ? 1 - state.grouping : state.grouping;
  const uint32_t iterations = state.iterations + 1;
  __syncthreads();
  if (threadIdx.x == 0) state = {0, changed ? 0u : 1u, grouping, iterations};
  if (!changed) return;

  const Problem problem = batch.problems[blockIdx.x];
  const uint16_t* labels = batch.labels + problem.first_token;
  const auto [members, begins] = GroupingOf(batch, blockIdx.x, problem, grouping);
  const Histograms histograms(problem.clusters <= kSharedClusters
                                  ? reinterpret_cast<uint16_t*>(shared_histograms)
                                  : batch.histograms + problem.first_histogram,
                              problem.clusters);
  const uint32_t warps = blockDim.x / 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t run = ((problem.tokens + warps - 1) / warps + 31) / 32 * 32;
  const uint32_t run_begin = min(problem.tokens, warp * run);
  const uint32_t run_end = min(problem.tokens, run_begin + run);

  histograms.Clear(warps);
  __syncthreads();
#pragma unroll 4
  for (uint32_t token = run_begin + threadIdx.x % 32; token < run_end; token += 32) {
    histograms.Count(warp, __ldg(labels + token));
  }
  __syncthreads();
  ScanClusters(histograms, problem, warps, begins);
  __syncthreads();
  Place(histograms, labels, run_begin, run_end, members);
}

}  // namespace

cudaError_t Group(const Batch& batch, bool first, cudaStream_t stream) {
  const uint32_t warps = batch.most_tokens <= 8192 ? kGroupWarps / 4 : kGroupWarps;
  const size_t bytes = size_t{warps} * ((batch.most_shared_clusters + 1) / 2 * 2) * 2;
  const cudaError_t error = cudaFuncSetAttribute(
      GroupKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  GroupKernel<<<batch.problem_count, warps * 32, bytes, stream>>>(batch, first);
  return cudaGetLastError();
}

}  // namespace clusterkv::gpu::cuda::kmeans
