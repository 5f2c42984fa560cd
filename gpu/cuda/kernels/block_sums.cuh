// Running sums over the threads of a block.
#pragma once

#include <cstdint>

namespace clusterkv::gpu::cuda {

template <uint32_t kThreads, uint32_t kValues>
struct BlockSums {
  uint32_t of_warp[kValues][kThreads / 32];
};

// Each value becomes the sum of the threads' before this one; the totals to all. All threads.
template <uint32_t kThreads, uint32_t kValues>
__device__ void ExclusiveSums(uint32_t (&values)[kValues], uint32_t (&totals)[kValues],
                              BlockSums<kThreads, kValues>& shared) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (uint32_t v = 0; v < kValues; ++v) {
    uint32_t sum = values[v];
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) shared.of_warp[v][warp] = sum;
    values[v] = sum - values[v];
  }
  __syncthreads();
#pragma unroll
  for (uint32_t v = 0; v < kValues; ++v) {
    totals[v] = 0;
#pragma unroll
    for (uint32_t w = 0; w < kThreads / 32; ++w) {
      if (w < warp) values[v] += shared.of_warp[v][w];
      totals[v] += shared.of_warp[v][w];
    }
  }
  __syncthreads();
}

}  // namespace clusterkv::gpu::cuda
