// Programmatic dependent launch (Hopper and later): the kernels of a step follow one another
// closely. A kernel that is launched so may be put in place while the one before still runs; its
// first act is to wait until that one is complete, its second to let the next one be put in place.
// Since each waits for its predecessor before anything else, waiting for one is waiting for all
// before it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace clusterkv::gpu::cuda {

// First in every kernel that LaunchOverlapped launches, by all threads.
__device__ inline void FollowPredecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// `overlap`: the device can (compute capability 9.0 and later). team: blocks of the grid's x that
// form a thread block cluster; 1: none.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchOverlapped(bool overlap, uint32_t team, void (*kernel)(Parameters...), dim3 grid,
                             dim3 block, size_t shared_bytes, cudaStream_t stream,
                             const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (overlap) {
    cudaLaunchAttribute& own = attributes[config.numAttrs++];
    own.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    own.val.programmaticStreamSerializationAllowed = 1;
  }
  if (team > 1) {
    cudaLaunchAttribute& own = attributes[config.numAttrs++];
    own.id = cudaLaunchAttributeClusterDimension;
    own.val.clusterDim.x = team;
    own.val.clusterDim.y = own.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchOverlapped(bool overlap, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t stream,
                             const Arguments&... arguments) {
  return LaunchOverlapped(overlap, 1, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace clusterkv::gpu::cuda
