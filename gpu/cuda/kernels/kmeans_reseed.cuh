// A centroid for an empty cluster: a key that fits its own cluster badly.
//
// Of E empty clusters the r-th takes a key of the r-th of E equal ranges of tokens, at random with
// a probability in proportion to 1 - cosine, as k-means++ would (Arthur and Vassilvitskii 2007).
// The worst key would do for one, but of several they may all be alike. It is the key of greatest
// (1 - cosine) / -ln(u), u uniform: no sum of weights is needed. Cost: the begins of all clusters
// and the scores of a range are read for each empty cluster; there are few.
#pragma once

#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_block.cuh"
#include "gpu/cuda/kernels/kmeans_centroid.cuh"
#include "gpu/kmeans_seed.h"

namespace clusterkv::gpu::cuda::kmeans {

// Keys this close to their (rounded) centroid are no better as a centroid of their own.
constexpr float kReseedBelow = 0.999f;

// A token of [begin, end) whose score is below kReseedBelow; kMaxTokens if there is none.
template <int kThreads>
__device__ inline uint32_t DrawBadToken(const Batch& batch, const Problem& problem, uint32_t begin,
                                        uint32_t end) {
  __shared__ float shared_priorities[kThreads];
  __shared__ uint32_t shared_tokens[kThreads];
  float most = 0.0f;
  uint32_t drawn = kMaxTokens;
  for (uint32_t token = begin + threadIdx.x; token < end; token += kThreads) {
    const uint64_t at = problem.first_token + token;
    const float cosine = batch.scores[at] * batch.inverse_norms[at];
    if (!(cosine < kReseedBelow) || batch.inverse_norms[at] == 0.0f) continue;
    const uint64_t bits = MixBits(problem.seed ^ (uint64_t{token} + 1) * 0x9E3779B97F4A7C15u);
    const float uniform = (static_cast<float>(bits >> 41) + 0.5f) * 0x1p-23f;
    const float priority = (1.0f - cosine) / -logf(uniform);
    if (!(priority > most)) continue;
    most = priority;
    drawn = token;
  }
  shared_priorities[threadIdx.x] = most;
  shared_tokens[threadIdx.x] = drawn;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) {
    const float priority = shared_priorities[i];
    const uint32_t token = shared_tokens[i];
    if (priority > most || (priority == most && token < drawn)) {
      most = priority;
      drawn = token;
    }
  }
  return drawn;
}

// All threads of the block call for a cluster without members.
template <typename T, int kDim, int kThreads>
__device__ inline void Reseed(const Batch& batch, uint32_t problem_index, const Problem& problem,
                              const uint32_t* begins, uint32_t cluster) {
  __shared__ uint32_t shared[kThreads / 32];
  uint32_t empty = 0;
  uint32_t before = 0;
  for (uint32_t i = threadIdx.x; i < problem.clusters; i += kThreads) {
    if (begins[i] != begins[i + 1]) continue;
    ++empty;
    if (i < cluster) ++before;
  }
  empty = BlockSum<kThreads>(empty, shared);
  before = BlockSum<kThreads>(before, shared);
  const auto begin = static_cast<uint32_t>(uint64_t{problem.tokens} * before / empty);
  const auto end = static_cast<uint32_t>(uint64_t{problem.tokens} * (before + 1) / empty);
  const uint32_t token = DrawBadToken<kThreads>(batch, problem, begin, end);
  if (token == kMaxTokens) return;
  SetCentroidToKey<T, kDim, kThreads>(batch, problem_index, problem, cluster, token);
}

}  // namespace clusterkv::gpu::cuda::kmeans
