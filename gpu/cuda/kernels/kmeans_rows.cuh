// Weighted sums of the rows that belong to a cluster, by one block.
//
// Each thread holds 16 bytes of every row of its slot; slot s takes members s, s + slots, ... in
// order, and the slots are added in order, so a sum depends on the list of members alone. Members
// are scattered, their rows contiguous: 128 bytes to a kilobyte. Cost: each row is read once, four
// rows a thread are in flight.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_element.cuh"

namespace clusterkv::gpu::cuda::kmeans {

// sum (shared memory, [kElements]) = sum over i < count of weight(i, token(i)) * (row of token(i)
// - mean), without those of weight 0; `stride` is between rows, in bytes. `mean` is null or has
// kElements. All kThreads threads of the block call; the last thing is a barrier.
template <typename T, int kElements, int kThreads, typename Token, typename Weight>
__device__ inline void SumRows(const unsigned char* rows, size_t stride, uint32_t count,
                               Token&& token, Weight&& weight, const float* mean, float* sum) {
  constexpr int kVectors = kElements / kVector;
  constexpr int kSlots = kThreads / kVectors;
  constexpr int kInFlight = 4;
  static_assert(kSlots >= 1);
  __shared__ float partial[kSlots][kElements];
  const int slot = static_cast<int>(threadIdx.x) / kVectors;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  float total[kVector] = {};
  float centre[kVector] = {};
  if (mean != nullptr) {
    for (int e = 0; e < kVector; ++e) centre[e] = mean[vector * kVector + e];
  }
  if (slot >= kSlots) count = 0;  // threads beyond the slots idle
  for (uint32_t base = slot; base < count; base += kSlots * kInFlight) {
    uint4 vectors[kInFlight];
    float weights[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t member = base + i * kSlots;
      weights[i] = 0.0f;
      vectors[i] = {};
      if (member >= count) continue;
      const uint32_t at = token(member);
      weights[i] = weight(member, at);
      vectors[i] = LoadOnce(rows + at * stride + vector * 16);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (weights[i] == 0.0f) continue;  // a row of NaN counts for nothing either
      float x[kVector];
      VectorToFloat<T>(vectors[i], x);
      for (int e = 0; e < kVector; ++e) total[e] += weights[i] * (x[e] - centre[e]);
    }
  }
  if (slot < kSlots) {
    for (int e = 0; e < kVector; ++e) partial[slot][vector * kVector + e] = total[e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kElements; i += kThreads) {
    float all = partial[0][i];
#pragma unroll
    for (int s = 1; s < kSlots; ++s) all += partial[s][i];
    sum[i] = all;
  }
  __syncthreads();
}

}  // namespace clusterkv::gpu::cuda::kmeans
