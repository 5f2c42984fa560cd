// A unit centroid, written as the assignment reads it.
//
// Centroids of a problem are stored so that any 8 of them (8j to 8j+7) are a contiguous run of
// 8x8-element matrices of 128 bytes, which is what ldmatrix and mma.sync take without bank
// conflicts, and a tile of them is one plain copy:
//
//   [centroid / 8][head_dim / 8][centroid % 8][8]
//
// Within each 32 dimensions the order is changed, the same for the keys, whose lanes then load 16
// contiguous bytes each: dimension 8t + 4s + 2h + e (t: lane of the quad, s: step of 16, h: half of
// it, e: 0 or 1) is element 2t + e of matrix 2s + h. A sum does not mind.
#pragma once

#include <cstddef>

#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_block.cuh"
#include "gpu/cuda/kernels/kmeans_element.cuh"

namespace clusterkv::gpu::cuda::kmeans {

// Where element `dim` of a centroid is, in elements.
template <int kDim>
__device__ inline size_t CentroidElement(uint64_t centroid, int dim) {
  const int within = dim % 32;
  const int matrix = dim / 32 * 4 + within % 8 / 4 * 2 + within % 4 / 2;
  const int element = within / 8 * 2 + within % 2;
  return centroid / 8 * (8 * kDim) + static_cast<size_t>(matrix) * 64 + centroid % 8 * 8 + element;
}

// Makes the direction of `sum` (shared memory, [kDim]) a problem's centroid, if it has one. All
// kClusterThreads threads call; they see `sum` after a barrier.
template <typename T, int kDim>
__device__ inline void SetCentroid(const Batch& batch, uint32_t problem_index, uint64_t centroid,
                                   const float* sum) {
  __shared__ double shared_double[kClusterThreads / 32];
  __shared__ float shared_float[kClusterThreads / 32];
  float squared = 0.0f;
  for (int i = threadIdx.x; i < kDim; i += kClusterThreads) squared += sum[i] * sum[i];
  squared = BlockSum<kClusterThreads>(squared, shared_float);
  float inverse;
  if (InRange(squared)) {
    inverse = rsqrtf(squared);
  } else {
    double exact = 0.0;
    for (int i = threadIdx.x; i < kDim; i += kClusterThreads) exact += double{sum[i]} * sum[i];
    inverse = InverseRoot(BlockSum<kClusterThreads>(exact, shared_double));
    if (inverse == 0.0f) return;
  }
  T* unit_centroids = static_cast<T*>(batch.unit_centroids);
  const float* mean = batch.means == nullptr ? nullptr : batch.means + size_t{problem_index} * kDim;
  float bias = 0.0f;  // of the rounded centroid: exact where its score is
  for (int i = threadIdx.x; i < kDim; i += kClusterThreads) {
    const T element = FromFloat<T>(sum[i] * inverse);
    unit_centroids[CentroidElement<kDim>(centroid, i)] = element;
    if (mean != nullptr) bias -= mean[i] * ToFloat(element);
  }
  if (mean == nullptr) return;
  bias = BlockSum<kClusterThreads>(bias, shared_float);
  if (threadIdx.x == 0) batch.biases[centroid] = bias;
}

// The key of a token less the mean, times its inverse norm, into `key` (shared memory, [kDim]).
template <typename T, int kDim>
__device__ inline void LoadUnitKey(const Batch& batch, uint32_t problem_index,
                                   const Problem& problem, uint32_t token, float* key) {
  const T* row = reinterpret_cast<const T*>(problem.rows) + size_t{token} * (2 * kDim);
  const float inverse = batch.inverse_norms[problem.first_token + token];
  for (int i = threadIdx.x; i < kDim; i += kClusterThreads) {
    float x = ToFloat(row[i]);
    if (batch.means != nullptr) x -= batch.means[size_t{problem_index} * kDim + i];
    key[i] = inverse == 0.0f ? 0.0f : x * inverse;
  }
}

}  // namespace clusterkv::gpu::cuda::kmeans
