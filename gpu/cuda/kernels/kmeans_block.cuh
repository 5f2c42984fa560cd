// Sums and scans over a block, in an order that depends on the thread index alone.
#pragma once

#include <cstdint>

namespace clusterkv::gpu::cuda::kmeans {

// The sum over all kThreads threads, given to each. `shared`: kThreads / 32 values. Two barriers.
template <int kThreads, typename S>
__device__ inline S BlockSum(S value, S* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) value += shared[warp];
  __syncthreads();
  return value;
}

// The sum over the threads before this one; `total` over all. `shared`: 32 values. blockDim.x is a
// multiple of 32. Three barriers.
__device__ inline uint32_t BlockExclusiveSum(uint32_t value, uint32_t* shared, uint32_t& total) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  uint32_t sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t before = __shfl_up_sync(0xFFFFFFFFu, sum, offset);
    if (lane >= offset) sum += before;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    uint32_t warps = lane < blockDim.x / 32 ? shared[lane] : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t before = __shfl_up_sync(0xFFFFFFFFu, warps, offset);
      if (lane >= offset) warps += before;
    }
    shared[lane] = warps;
  }
  __syncthreads();
  total = shared[blockDim.x / 32 - 1];
  sum += warp == 0 ? 0 : shared[warp - 1];
  __syncthreads();
  return sum - value;
}

}  // namespace clusterkv::gpu::cuda::kmeans
