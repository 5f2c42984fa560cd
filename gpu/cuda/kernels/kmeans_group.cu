// Grouping: a stable counting sort of a problem's tokens by label, one block a problem.
//
//   1  each warp counts the labels of its own run of tokens            histogram [warp][cluster]
//   2  per cluster the counts of the warps before; over clusters, begins
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

// Counts of a cluster become those of the warps before; begins get the sums over clusters.
__device__ void ScanClusters(const Histograms& histograms, const Problem& problem, uint32_t warps,
                             uint32_t* begins) {
  __shared__ uint32_t shared[32];
  uint32_t before = 0;
  for (uint32_t base = 0; base < problem.clusters; base += blockDim.x) {
    const uint32_t cluster = base + threadIdx.x;
    uint32_t size = 0;
    if (cluster < problem.clusters) {
      for (uint32_t warp = 0; warp < warps; ++warp) {
        uint16_t& entry = histograms.At(warp, cluster);
        const uint32_t count = entry;
        entry = static_cast<uint16_t>(size);
        size += count;
      }
    }
    uint32_t total;
    const uint32_t begin = before + BlockExclusiveSum(size, shared, total);
    if (cluster < problem.clusters) begins[cluster] = begin;
    before += total;
  }
  if (threadIdx.x == 0) begins[problem.clusters] = before;
}

__device__ void Place(const Histograms& histograms, const uint16_t* labels, const uint32_t* begins,
                      uint32_t run_begin, uint32_t run_end, uint16_t* members) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  for (uint32_t base = run_begin; base < run_end; base += 32) {
    const uint32_t token = base + lane;
    const bool inside = token < run_end;
    const uint32_t label = inside ? __ldg(labels + token) : kMaxTokens;
    const uint32_t equals = __match_any_sync(0xFFFFFFFFu, label);
    const uint32_t rank = __popc(equals & ((1u << lane) - 1));
    uint32_t before = 0;
    if (inside) before = histograms.At(warp, label);
    __syncwarp();
    if (inside && rank == 0) {
      histograms.At(warp, label) = static_cast<uint16_t>(before + __popc(equals));
    }
    __syncwarp();
    if (inside) members[begins[label] + before + rank] = static_cast<uint16_t>(token);
  }
}

__global__ void __launch_bounds__(1024)
    GroupKernel(const __grid_constant__ Batch batch, bool first_time) {
  extern __shared__ uint32_t shared_histograms[];
  State& state = batch.states[blockIdx.x];
  if (state.done != 0) return;
  const bool changed = first_time || state.changed != 0;
  __syncthreads();
  if (threadIdx.x == 0) state = {0, changed ? 0u : 1u};
  if (!changed) return;

  const Problem problem = batch.problems[blockIdx.x];
  const uint16_t* labels = batch.labels + problem.first_token;
  uint32_t* begins = batch.begins + problem.first_cluster + blockIdx.x;
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
  Place(histograms, labels, begins, run_begin, run_end, batch.members + problem.first_token);
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
