// Which rows a step attends to besides those that it selected, and where they lie.
#pragma once

#include "gpu/cuda/kernels/attend_tile.cuh"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda {

// The rows of the window: [begin, length).
struct WindowRows {
  uint32_t begin, count;
};

__device__ inline WindowRows FindWindow(const StateBlock& block, const StepLatch& latch) {
  const uint32_t length = latch.length;
  uint32_t begin = max(latch.cut, block.sink_tokens);
  // After an overflow only the newest are still there.
  if (length > begin) begin = max(begin, length - min(length, block.window_slots));
  return {begin, length > begin ? length - begin : 0};
}

// Row that holds K, then V.
__device__ inline TileRow ExactRow(const DeviceState& state, std::byte* row) {
  TileRow found;
  found.key = row;
  found.value = row + state.mean_bytes();
  found.bias = 0.0f;
  return found;
}

// What stands for the tokens of a cluster that are not attended exactly (RetroInfer).
__device__ inline TileRow EstimateRow(const DeviceState& state, size_t head, uint32_t cluster,
                                      const uint32_t* taken) {
  TileRow found;
  const uint32_t tokens = state.ClusterTokens(state.clusters(head)[cluster]);
  const uint32_t left = tokens - min(tokens, taken[cluster]);
  if (left == 0) return found;
  found.key = state.centroids(head) + cluster * state.mean_bytes();
  found.value = state.value_means(head) + cluster * state.mean_bytes();
  found.bias = log2f(static_cast<float>(left));
  return found;
}

}  // namespace clusterkv::gpu::cuda
