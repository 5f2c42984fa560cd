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

// Null if keys are not centred.
template <int kDim>
__device__ inline const float* MeanOf(const Batch& batch, uint32_t problem_index) {
  return batch.means == nullptr ? nullptr : batch.means + size_t{problem_index} * kDim;
}

// Where element `dim` of a centroid is, in elements.
template <int kDim>
__device__ inline size_t CentroidElement(uint64_t centroid, int dim) {
  const int within = dim % 32;
  const int matrix = dim / 32 * 4 + within % 8 / 4 * 2 + within % 4 / 2;
  const int element = within / 8 * 2 + within % 2;
  return centroid / 8 * (8 * kDim) + static_cast<size_t>(matrix) * 64 + centroid % 8 * 8 + element;
}

// Makes the direction of `sum` (shared memory, [kDim]) a problem's centroid; false if it has none.
// All kThreads threads of the block call and get the same answer; they see `sum` after a barrier.
template <typename T, int kDim, int kThreads>
__device__ inline bool SetCentroid(const Batch& batch, uint32_t problem_index, uint64_t centroid,
                                   const float* sum) {
  __shared__ double shared_double[kThreads / 32];
  __shared__ float shared_float[kThreads / 32];
  float squared = 0.0f;
  for (int i = threadIdx.x; i < kDim; i += kThreads) squared += sum[i] * sum[i];
  squared = BlockSum<kThreads>(squared, shared_float);
  float inverse = rsqrtf(squared);
  if (!InRange(squared)) {
    double exact = 0.0;
    for (int i = threadIdx.x; i < kDim; i += kThreads) exact += double{sum[i]} * sum[i];
    inverse = InverseRoot(BlockSum<kThreads>(exact, shared_double));
    if (inverse == 0.0f) return false;
  }
  T* unit_centroids = static_cast<T*>(batch.unit_centroids);
  const float* mean = MeanOf<kDim>(batch, problem_index);
  float bias = 0.0f;  // of the rounded centroid: exact where its score is
  for (int i = threadIdx.x; i < kDim; i += kThreads) {
    const T element = FromFloat<T>(sum[i] * inverse);
    unit_centroids[CentroidElement<kDim>(centroid, i)] = element;
    if (mean != nullptr) bias -= mean[i] * ToFloat(element);
  }
  if (mean == nullptr) return true;
  bias = BlockSum<kThreads>(bias, shared_float);
  if (threadIdx.x == 0) batch.biases[centroid] = bias;
  return true;
}

// The same for a key, less the mean.
template <typename T, int kDim, int kThreads>
__device__ inline bool SetCentroidToKey(const Batch& batch, uint32_t problem_index,
                                        const Problem& problem, uint32_t cluster, uint32_t token) {
  __shared__ float key[kDim];
  const T* row = reinterpret_cast<const T*>(problem.rows) + size_t{token} * (2 * kDim);
  const float* mean = MeanOf<kDim>(batch, problem_index);
  __syncthreads();  // nobody reads another key any more
  for (int i = threadIdx.x; i < kDim; i += kThreads) {
    key[i] = ToFloat(row[i]) - (mean == nullptr ? 0.0f : mean[i]);
  }
  __syncthreads();
  return SetCentroid<T, kDim, kThreads>(batch, problem_index, problem.first_centroid + cluster,
                                        key);
}

}  // namespace clusterkv::gpu::cuda::kmeans
