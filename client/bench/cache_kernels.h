// Launches of the kernels that only measuring needs. Built only with CLUSTERKV_CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "gpu/state_block.h"

namespace clusterkv::client::bench {

// Device memory throughout. For item = (state * layers + layer) * kv_heads + head.
struct CacheEditLaunch {
  gpu::StateBlock block;
  std::byte* const* states;
  uint32_t state_count;
  const uint32_t* evict_begins;  // [items + 1]
  const uint32_t* evict;
  const uint32_t* fill_begins;  // [items + 1]
  const uint32_t* fill;
};
cudaError_t LaunchCacheEdit(const CacheEditLaunch& args, cudaStream_t stream);

// Reads `bytes` (a multiple of 16), so that they are what L2 holds. sink: one word.
cudaError_t LaunchRead(const std::byte* data, size_t bytes, uint32_t* sink, cudaStream_t stream);

}  // namespace clusterkv::client::bench
