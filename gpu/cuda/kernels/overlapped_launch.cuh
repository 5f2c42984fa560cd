// Programmatic dependent launch (Hopper and later): the kernels of a step follow one another
// closely. A kernel that is launched so may be put in place while the one before still runs; its
// first act is to wait until that one is complete, its second to let the next one be put in place.
// Since each waits for its predecessor before anything else, waiting for one is waiting for all
// before it.
#pragma once

#include <cuda_runtime.h>

namespace clusterkv::gpu::cuda {

// First in every kernel that LaunchOverlapped launches, by all threads.
__device__ inline void FollowPredecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// `overlap`: the device can (compute capability 9.0 and later).
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchOverlapped(bool overlap, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t stream,
                             const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace clusterkv::gpu::cuda
