// Launches of the daemon's side beside k-means (kmeans.h): staging, permuting, publishing. Arrays
// of problems lie in device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "gpu/state_block.h"

namespace clusterkv::gpu::cuda {

cudaError_t LaunchInitialize(std::byte* state, const StateBlock& block, uint32_t generation,
                             cudaStream_t stream);

// As gpu::StageArgs; of 2-byte elements.
struct StageLaunch {
  const std::byte* range;
  size_t layer_stride;  // not 0
  uint32_t range_tokens, first_token, count, layer_count, kv_heads, head_dim;
  std::byte* const* destinations;  // [layer_count * kv_heads]; null: they are `few`
  // A served step's: an upload of so little costs more than the staging.
  static constexpr uint32_t kFew = 256;
  std::byte* few[kFew];
};
cudaError_t LaunchStage(const StageLaunch& args, cudaStream_t stream);

struct GatherProblem {
  const std::byte* rows;
  std::byte* target;  // [tokens] rows: rows[order[i]]
  const uint32_t* order;
  uint32_t* positions;  // [tokens]: first_position + order[i]
  uint32_t tokens, first_position;
};
// `most_tokens` of any problem shapes the grid.
cudaError_t LaunchGather(const GatherProblem* problems, uint32_t count, uint32_t most_tokens,
                         uint32_t row_bytes, uint32_t* fault, cudaStream_t stream);

struct PublishHead {
  const uint32_t* sizes;
  const std::byte* centroids;
  const std::byte* value_means;
  uint32_t cluster_begin, cluster_count, chunk, rows_offset, positions_offset;
};
struct PublishLaunch {
  std::byte* state;
  StateBlock block;
  uint32_t segment, segment_begin, segment_end;
  const PublishHead* heads;  // [layers * kv_heads]
  uint32_t* invalid;         // device, 0: set by a head whose sizes do not add up
};
// Metadata of all heads, then, if every one was valid, published_segments (release, system scope).
cudaError_t LaunchPublish(const PublishLaunch& args, uint32_t* fault, cudaStream_t stream);

}  // namespace clusterkv::gpu::cuda
