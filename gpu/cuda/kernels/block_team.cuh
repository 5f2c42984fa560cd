// Blocks that share a piece of work, or a block that has it alone: the same code for both.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace clusterkv::gpu::cuda {

// Neighbours along the grid's x: a thread block cluster. A block alone is not launched as one.
struct Team {
  uint32_t blocks, rank;

  __device__ bool first() const { return rank == 0; }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  // All threads of all blocks. What came before Arrive in one block comes before what follows Wait
  // in the others.
  __device__ void Arrive() const {
    if (blocks > 1) cooperative_groups::this_cluster().barrier_arrive();
  }
  __device__ void Wait() const {
    if (blocks > 1) cooperative_groups::this_cluster().barrier_wait();
  }
  // Another block's copy of a shared variable.
  template <typename T>
  __device__ T& Of(uint32_t block, T& shared) const {
    return *cooperative_groups::this_cluster().map_shared_rank(&shared, block);
  }
#else
  __device__ void Arrive() const {}
  __device__ void Wait() const {}
  template <typename T>
  __device__ T& Of(uint32_t /*block*/, T& shared) const {
    return shared;
  }
#endif
};

}  // namespace clusterkv::gpu::cuda
