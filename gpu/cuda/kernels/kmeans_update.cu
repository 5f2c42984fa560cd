// Update: each centroid becomes the direction of the sum of its unit keys, one block a cluster.
//
// An empty cluster is given a key that fits its own cluster badly: of E empty ones, the r-th takes
// the worst of the r-th of E equal ranges of tokens. That is not quite the E worst, but needs no
// sort. Cost: the keys are read once, in runs of one key.
#include <cmath>

#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_block.cuh"
#include "gpu/cuda/kernels/kmeans_centroid.cuh"
#include "gpu/cuda/kernels/kmeans_rows.cuh"

namespace clusterkv::gpu::cuda::kmeans {
namespace {

// Keys this close to their (rounded) centroid are no better as a centroid of their own.
constexpr float kReseedBelow = 0.999f;

// The token of lowest score in [begin, end), of those below kReseedBelow; kMaxTokens if none.
__device__ uint32_t WorstToken(const Batch& batch, const Problem& problem, uint32_t begin,
                               uint32_t end) {
  __shared__ float shared_scores[kClusterThreads];
  __shared__ uint32_t shared_tokens[kClusterThreads];
  float worst = kReseedBelow;
  uint32_t worst_token = kMaxTokens;
  for (uint32_t token = begin + threadIdx.x; token < end; token += kClusterThreads) {
    const float score = batch.scores[problem.first_token + token];
    if (!(score < worst) || batch.inverse_norms[problem.first_token + token] == 0.0f) continue;
    worst = score;
    worst_token = token;
  }
  shared_scores[threadIdx.x] = worst;
  shared_tokens[threadIdx.x] = worst_token;
  __syncthreads();
  for (int i = 0; i < kClusterThreads; ++i) {
    const float score = shared_scores[i];
    const uint32_t token = shared_tokens[i];
    if (score < worst || (score == worst && token < worst_token)) {
      worst = score;
      worst_token = token;
    }
  }
  return worst_token;
}

template <typename T, int kDim>
__device__ void Reseed(const Batch& batch, uint32_t problem_index, const Problem& problem,
                       const uint32_t* begins, uint32_t cluster, float* key) {
  __shared__ uint32_t shared[kClusterThreads / 32];
  uint32_t empty = 0;
  uint32_t before = 0;
  for (uint32_t i = threadIdx.x; i < problem.clusters; i += kClusterThreads) {
    if (begins[i] != begins[i + 1]) continue;
    ++empty;
    if (i < cluster) ++before;
  }
  empty = BlockSum<kClusterThreads>(empty, shared);
  before = BlockSum<kClusterThreads>(before, shared);
  const auto begin = static_cast<uint32_t>(uint64_t{problem.tokens} * before / empty);
  const auto end = static_cast<uint32_t>(uint64_t{problem.tokens} * (before + 1) / empty);
  const uint32_t token = WorstToken(batch, problem, begin, end);
  if (token == kMaxTokens) return;
  LoadUnitKey<T, kDim>(batch, problem_index, problem, token, key);
  __syncthreads();
  SetCentroid<T, kDim>(batch, problem_index, problem.first_centroid + cluster, key);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kClusterThreads)
    UpdateKernel(const __grid_constant__ Batch batch, uint32_t first_cluster) {
  __shared__ float sum[kDim];
  const uint32_t problem_index = batch.cluster_problem[first_cluster + blockIdx.x];
  if (batch.states[problem_index].done != 0) return;
  const Problem problem = batch.problems[problem_index];
  const uint32_t cluster = first_cluster + blockIdx.x - problem.first_cluster;
  const uint32_t* begins = batch.begins + problem.first_cluster + problem_index;
  const uint32_t begin = begins[cluster];
  const uint32_t end = begins[cluster + 1];
  if (begin == end) {
    Reseed<T, kDim>(batch, problem_index, problem, begins, cluster, sum);
    return;
  }
  const Members members{problem.rows, 4 * kDim, batch.members + problem.first_token + begin,
                        end - begin};
  const float* mean = batch.means == nullptr ? nullptr : batch.means + size_t{problem_index} * kDim;
  const float* inverse_norms = batch.inverse_norms + problem.first_token;
  SumRows<T, kDim>(
      members, mean, [&](uint32_t token) { return __ldg(inverse_norms + token); }, sum);
  SetCentroid<T, kDim>(batch, problem_index, problem.first_centroid + cluster, sum);
}

}  // namespace

cudaError_t Update(const Batch& batch, cudaStream_t stream) {
  const double bytes = static_cast<double>(batch.tokens) * batch.head_dim * 2.0;
  return ForShape(batch, [&]<typename T, int kDim>() {
    return InRanges(batch.clusters, bytes, kBytesPerLaunch, [&](uint32_t first, uint32_t count) {
      UpdateKernel<T, kDim><<<count, kClusterThreads, 0, stream>>>(batch, first);
    });
  });
}

}  // namespace clusterkv::gpu::cuda::kmeans
