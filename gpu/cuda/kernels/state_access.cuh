// Typed access to a sequence's state from kernels; the device's twin of host/state_view.h. What is
// read from the block is bounded by the layout here, so that a damaged block leads nowhere outside
// itself.
#pragma once

#include <cuda/atomic>

#include "gpu/cuda/kernels/batch_table.h"

namespace clusterkv::gpu::cuda {

// The namespace's own, for the device.
template <typename T>
__device__ T* At(std::byte* state, uint64_t offset) {
  return reinterpret_cast<T*>(state + offset);
}

__device__ inline size_t HeadIndex(const StateBlock& block, uint32_t layer, uint32_t kv_head) {
  return size_t{layer} * block.kv_heads + kv_head;
}

class DeviceState {
 public:
  __device__ explicit DeviceState(const DeviceSlot& slot)
      : state_(slot.state), block_(slot.block), generation_(slot.generation) {}

  __device__ const StateBlock& block() const { return block_; }

  // The worker learned of the generation after it was written, so no acquire is needed.
  __device__ bool IsCurrent() const { return IsCurrent(header()); }
  __device__ bool IsCurrent(const StateHeader& header) const {
    return header.generation == generation_ && header.magic == kStateMagic &&
           header.version == block_.version;
  }
  __device__ StateHeader& header() const { return *At<StateHeader>(state_, block_.header); }
  __device__ StepLatch& latch() const { return *At<StepLatch>(state_, block_.latch); }
  __device__ uint32_t* published_segments() const {
    return At<uint32_t>(state_, block_.published_segments);
  }
  __device__ LayerCounters& counters(uint32_t layer) const {
    return At<LayerCounters>(state_, block_.counters)[layer];
  }
  __device__ uint32_t* segment_ends() const { return At<uint32_t>(state_, block_.segment_ends); }

  // Arrays of one (layer, KV head); `head` is HeadIndex.
  __device__ SegmentRun* segment_runs(size_t head) const {
    return At<SegmentRun>(state_, block_.segment_runs) + head * block_.max_segments;
  }
  __device__ ClusterEntry* clusters(size_t head) const {
    return At<ClusterEntry>(state_, block_.clusters) + head * block_.max_clusters;
  }
  __device__ std::byte* centroids(size_t head) const {
    return state_ + block_.centroids + head * block_.max_clusters * mean_bytes();
  }
  __device__ std::byte* value_means(size_t head) const {
    return state_ + block_.value_means + head * block_.max_clusters * mean_bytes();
  }
  __device__ std::byte* sink(size_t head, uint32_t position) const {
    return state_ + block_.sinks + (head * block_.sink_tokens + position) * row_bytes();
  }
  __device__ std::byte* window(size_t head, uint32_t position) const {
    const size_t slot = position % block_.window_slots;
    return state_ + block_.window + (head * block_.window_slots + slot) * row_bytes();
  }
  // Where one token belongs: sinks or window.
  __device__ std::byte* token_row(size_t head, uint32_t position) const {
    return position < block_.sink_tokens ? sink(head, position) : window(head, position);
  }
  __device__ std::byte* cache(size_t head, uint32_t slot) const {
    return state_ + block_.cache + (head * block_.cache_tokens + slot) * row_bytes();
  }
  __device__ uint32_t* slot_of_row(size_t head) const {
    return At<uint32_t>(state_, block_.slot_of_row) + head * block_.max_rows;
  }
  __device__ uint32_t* last_used(size_t head) const {
    return At<uint32_t>(state_, block_.last_used) + head * block_.max_clusters;
  }
  __device__ float* mean_scores(size_t head) const {
    return At<float>(state_, block_.mean_scores) + head * block_.max_clusters;
  }
  __device__ uint32_t* free_slots(size_t head) const {
    return At<uint32_t>(state_, block_.free_slots) + head * block_.cache_tokens;
  }
  __device__ uint32_t& free_count(size_t head) const {
    return At<uint32_t>(state_, block_.free_count)[head];
  }

  // Scratch of the layer that is being decoded, by KV head.
  __device__ uint32_t& selected_count(uint32_t kv_head) const {
    return At<uint32_t>(state_, block_.selected_count)[kv_head];
  }
  __device__ uint32_t* selected_cluster(uint32_t kv_head) const {
    return At<uint32_t>(state_, block_.selected_cluster) + Scratch(kv_head);
  }
  __device__ uint32_t* selected_take(uint32_t kv_head) const {
    return At<uint32_t>(state_, block_.selected_take) + Scratch(kv_head);
  }
  __device__ uint32_t& slot_count(uint32_t kv_head) const {
    return At<uint32_t>(state_, block_.slot_count)[kv_head];
  }
  __device__ uint32_t* slot_table(uint32_t kv_head) const {
    return At<uint32_t>(state_, block_.slot_table) + Scratch(kv_head);
  }

  // Clusters of one (layer, KV head) that a step of so many segments sees.
  __device__ uint32_t VisibleClusters(size_t head, uint32_t segments) const {
    segments = min(segments, block_.max_segments);
    if (segments == 0) return 0;
    return min(segment_runs(head)[segments - 1].cluster_end, block_.max_clusters);
  }
  // Tokens of a cluster; 0 if the entry leads outside the row space.
  __device__ uint32_t ClusterTokens(const ClusterEntry& entry) const {
    return uint64_t{entry.first_row} + entry.tokens <= block_.max_rows ? entry.tokens : 0;
  }

  // dtype is 2 bytes wide on this backend.
  __device__ size_t mean_bytes() const { return size_t{block_.head_dim} * 2; }
  __device__ size_t row_bytes() const { return 2 * mean_bytes(); }

 private:
  __device__ size_t Scratch(uint32_t kv_head) const {
    return size_t{kv_head} * block_.budget_tokens;
  }

  std::byte* const state_;
  const StateBlock& block_;
  const uint32_t generation_;
};

// What a block needs of its slot, in shared memory: read from the table once, instead of a chain of
// reads of L2 for every offset.
struct SharedSlot {
  DeviceSlot slot;
  StateHeader header;
  StepLatch latch;
  uint32_t count;
};

enum class Entry { kSkip, kStale, kCurrent };

// All threads of the block, at least 96. Two round trips to L2.
__device__ inline Entry EnterSlot(const BatchTable* table, uint32_t index, SharedSlot& shared) {
  constexpr uint32_t kWords = sizeof(DeviceSlot) / 4;
  static_assert(kWords <= 95);
  if (threadIdx.x < kWords) {
    reinterpret_cast<uint32_t*>(&shared.slot)[threadIdx.x] =
        reinterpret_cast<const uint32_t*>(table->slots + index)[threadIdx.x];
  } else if (threadIdx.x == 95) {
    shared.count = table->count;
  }
  __syncthreads();
  if (index >= shared.count || shared.slot.active == 0 || shared.slot.state == nullptr) {
    return Entry::kSkip;
  }
  const std::byte* const state = shared.slot.state;
  constexpr uint32_t kHeaderWords = sizeof(StateHeader) / 4, kLatchWords = sizeof(StepLatch) / 4;
  if (threadIdx.x < kHeaderWords) {
    reinterpret_cast<uint32_t*>(&shared.header)[threadIdx.x] =
        reinterpret_cast<const uint32_t*>(state + shared.slot.block.header)[threadIdx.x];
  } else if (threadIdx.x < kHeaderWords + kLatchWords) {
    const uint32_t word = threadIdx.x - kHeaderWords;
    reinterpret_cast<uint32_t*>(&shared.latch)[word] =
        reinterpret_cast<const uint32_t*>(state + shared.slot.block.latch)[word];
  }
  __syncthreads();
  return DeviceState(shared.slot).IsCurrent(shared.header) ? Entry::kCurrent : Entry::kStale;
}

// A slot that a thread works on: active, and its state is what the slot says. Null otherwise.
__device__ inline const DeviceSlot* ActiveSlot(const BatchTable* table, uint32_t index) {
  if (index >= table->count) return nullptr;
  const DeviceSlot& slot = table->slots[index];
  return slot.active != 0 && slot.state != nullptr ? &slot : nullptr;
}

// Relaxed: the chunk was mapped before the segment was published that begin-step has acquired. (An
// acquire over PCIe costs a microsecond, one block after the other.)
__device__ inline const std::byte* LoadHostChunk(const std::byte* const* chunks, uint32_t chunk) {
  const std::byte* address;
  asm volatile("ld.relaxed.sys.u64 %0, [%1];" : "=l"(address) : "l"(chunks + chunk) : "memory");
  return address;
}

// Keeps one of the first faults. `fault` lies in pinned host memory, where PCIe has no atomics: of
// two threads that report at once either's kind and value may stay.
__device__ inline void Report(uint32_t* fault, KernelFault kind, uint32_t value) {
  auto* const words = static_cast<volatile uint32_t*>(fault);
  if (words[0] != 0) return;
  words[1] = value;
  __threadfence_system();
  words[0] = static_cast<uint32_t>(kind);
}

}  // namespace clusterkv::gpu::cuda
