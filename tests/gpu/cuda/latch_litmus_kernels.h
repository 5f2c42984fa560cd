// Kernels of the latch litmus: what is published is a function of (segment, place), so that a
// reader recognises a torn or early word.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/state_block.h"

namespace clusterkv::gpu::cuda {

// One segment's rows, means and sizes: `tokens` rows of one cluster each, for every head.
cudaError_t LaunchFillSegment(std::byte* rows, std::byte* means, uint32_t* sizes, uint32_t heads,
                              uint32_t tokens, uint32_t row_bytes, uint32_t segment,
                              cudaStream_t stream);

struct LitmusCounts {
  unsigned long long steps, segments_seen, words, wrong_words, steps_back;
  uint32_t last_segments;
};

// After begin-step: checks the newest segments that the latch shows, metadata and host rows,
// against what they must be.
cudaError_t LaunchCheckStep(std::byte* state, const StateBlock& block,
                            const std::byte* const* host_chunks, uint32_t first_position,
                            uint32_t tokens, LitmusCounts* counts, cudaStream_t stream);

}  // namespace clusterkv::gpu::cuda
