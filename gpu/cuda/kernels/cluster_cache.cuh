// The cluster cache of one (layer, KV head): where host chunks are mapped, and who makes room.
#pragma once

#include "gpu/cluster_worth.h"
#include "gpu/cuda/kernels/state_access.cuh"
#include "gpu/cuda/kernels/weighted_prefix.cuh"

namespace clusterkv::gpu::cuda {

// Where a chunk is mapped in this process; null if it is not. of: the scratch's chunk_steps of the
// slot, read ahead of need.
__device__ inline const std::byte* FindChunk(const DeviceSlot& slot, const StepLatch& latch,
                                             const DecodeScratch& scratch, uint32_t index, uint2 of,
                                             uint32_t chunk) {
  if (slot.host_chunks == nullptr) return nullptr;
  const std::byte* found = nullptr;
  if (chunk < min(slot.chunk_count, scratch.chunk_stride) && of.x == slot.generation &&
      of.y == latch.step) {
    found = scratch.chunks[size_t{index} * scratch.chunk_stride + chunk];
  }
  return found != nullptr ? found : LoadHostChunk(slot.host_chunks, chunk);
}

template <uint32_t kThreads>
struct EvictShared {
  PrefixShared<kThreads> prefix;
  uint32_t freed;  // free slots: set before, goes up while clusters are evicted
  bool damaged;    // false before
};

// Frees the slots of the clusters of the least worth until `needed` more are free; those of this
// step stay. keys, weights: room for `clusters`; victims: too. All threads of the block.
template <uint32_t kThreads>
__device__ void Evict(const DeviceState& state, size_t head, uint32_t clusters, uint32_t needed,
                      uint32_t step, uint32_t* keys, uint32_t* weights, uint64_t* victims,
                      EvictShared<kThreads>& shared) {
  const uint32_t cache_tokens = state.block().cache_tokens;
  const ClusterEntry* const entries = state.clusters(head);
  uint32_t* const last_used = state.last_used(head);
  const float* const mean_scores = state.mean_scores(head);
  for (uint32_t c = threadIdx.x; c < clusters; c += kThreads) {
    const uint32_t used = last_used[c];
    const uint32_t tokens = state.ClusterTokens(entries[c]);
    // The least worth first. 0 is no victim: not resident, or of this step.
    keys[c] = used == 0 || used == step
                  ? 0
                  : ~OrderedKey(ClusterWorth(state.block().group, mean_scores[c], tokens));
    weights[c] = tokens;
  }
  __syncthreads();
  const uint32_t count =
      ChoosePrefix<kThreads>(keys, weights, clusters, needed, victims, false, shared.prefix);
  uint32_t* const free_slots = state.free_slots(head);
  const uint32_t* const slot_of_row = state.slot_of_row(head);
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t i = threadIdx.x / 32; i < count; i += kThreads / 32) {
    const uint32_t cluster = ItemId(victims[i]);
    const ClusterEntry entry = entries[cluster];
    const uint32_t tokens = state.ClusterTokens(entry);
    uint32_t first = 0;
    if (lane == 0) {
      first = atomicAdd(&shared.freed, tokens);
      last_used[cluster] = 0;
    }
    first = __shfl_sync(0xffffffffu, first, 0);
    if (uint64_t{first} + tokens > cache_tokens) {
      shared.damaged = true;
      continue;
    }
    for (uint32_t row = lane; row < tokens; row += 32) {
      free_slots[first + row] = slot_of_row[entry.first_row + row];
    }
  }
  __syncthreads();
}

}  // namespace clusterkv::gpu::cuda
