// Typed access to one sequence's state block, for the host operations. Whatever is read from the
// block is bounded by the layout here, so that a damaged block cannot lead outside itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "gpu/state_layout.h"

namespace clusterkv::gpu::host {

// A view; owns nothing. As thread-safe as the block's rules of one writer each make it.
class StateView {
 public:
  StateView(std::byte* state, const StateLayout& layout) : state_(state), layout_(layout) {}
  explicit StateView(const BatchSlot& slot) : StateView(slot.state, *slot.layout) {}

  const StateLayout& layout() const { return layout_; }

  // Magic, version and generation are those of the slot.
  bool IsCurrent(uint32_t generation) const {
    StateHeader& header = *At<StateHeader>(state_, layout_.header);
    return std::atomic_ref(header.generation).load(std::memory_order_acquire) == generation &&
           header.magic == kStateMagic && header.version == layout_.version;
  }
  StateHeader& header() const { return *At<StateHeader>(state_, layout_.header); }
  StepLatch& latch() const { return *At<StepLatch>(state_, layout_.latch); }
  std::atomic_ref<uint32_t> published_segments() const {
    return std::atomic_ref(*At<uint32_t>(state_, layout_.published_segments));
  }
  LayerCounters& counters(uint32_t layer) const {
    return At<LayerCounters>(state_, layout_.counters)[layer];
  }
  uint32_t* segment_ends() const { return At<uint32_t>(state_, layout_.segment_ends); }

  // Arrays of one (layer, KV head); `head` is StateLayout::head_index.
  SegmentRun* segment_runs(size_t head) const {
    return At<SegmentRun>(state_, layout_.segment_runs) + head * layout_.max_segments;
  }
  ClusterEntry* clusters(size_t head) const {
    return At<ClusterEntry>(state_, layout_.clusters) + head * layout_.max_clusters;
  }
  std::byte* centroids(size_t head) const {
    return state_ + layout_.centroids + head * layout_.max_clusters * mean_bytes();
  }
  std::byte* value_means(size_t head) const {
    return state_ + layout_.value_means + head * layout_.max_clusters * mean_bytes();
  }
  std::byte* sink(size_t head, uint32_t position) const {
    return state_ + layout_.sinks + (head * layout_.sink_tokens + position) * layout_.row_bytes();
  }
  std::byte* window(size_t head, uint32_t position) const {
    const size_t slot = position % layout_.window_slots;
    return state_ + layout_.window + (head * layout_.window_slots + slot) * layout_.row_bytes();
  }
  std::byte* cache(size_t head, uint32_t slot) const {
    return state_ + layout_.cache + (head * layout_.cache_tokens + slot) * layout_.row_bytes();
  }
  uint32_t* slot_of_row(size_t head) const {
    return At<uint32_t>(state_, layout_.slot_of_row) + head * layout_.max_rows;
  }
  uint32_t* last_used(size_t head) const {
    return At<uint32_t>(state_, layout_.last_used) + head * layout_.max_clusters;
  }
  float* mean_scores(size_t head) const {
    return At<float>(state_, layout_.mean_scores) + head * layout_.max_clusters;
  }
  uint32_t* free_slots(size_t head) const {
    return At<uint32_t>(state_, layout_.free_slots) + head * layout_.cache_tokens;
  }
  uint32_t& free_count(size_t head) const { return At<uint32_t>(state_, layout_.free_count)[head]; }

  // Scratch of the layer that is being decoded, by KV head.
  uint32_t& selected_count(uint32_t kv_head) const {
    return At<uint32_t>(state_, layout_.selected_count)[kv_head];
  }
  uint32_t* selected_cluster(uint32_t kv_head) const {
    return At<uint32_t>(state_, layout_.selected_cluster) + Scratch(kv_head);
  }
  uint32_t* selected_take(uint32_t kv_head) const {
    return At<uint32_t>(state_, layout_.selected_take) + Scratch(kv_head);
  }
  uint32_t& slot_count(uint32_t kv_head) const {
    return At<uint32_t>(state_, layout_.slot_count)[kv_head];
  }
  uint32_t* slot_table(uint32_t kv_head) const {
    return At<uint32_t>(state_, layout_.slot_table) + Scratch(kv_head);
  }

  // First position of the window: what neither sinks nor the step's published segments hold.
  uint32_t WindowBegin() const { return std::max(latch().cut, layout_.sink_tokens); }

  // Clusters of one (layer, KV head) that this step sees.
  uint32_t VisibleClusters(size_t head) const {
    const uint32_t segments = std::min(latch().segments, layout_.max_segments);
    if (segments == 0) return 0;
    return std::min(segment_runs(head)[segments - 1].cluster_end, layout_.max_clusters);
  }
  // Tokens of a cluster; 0 if the entry leads outside the row space.
  uint32_t ClusterTokens(const ClusterEntry& entry) const {
    return uint64_t{entry.first_row} + entry.tokens <= layout_.max_rows ? entry.tokens : 0;
  }

  size_t mean_bytes() const { return size_t{layout_.head_dim} * SizeOf(layout_.dtype); }

 private:
  size_t Scratch(uint32_t kv_head) const { return size_t{kv_head} * layout_.budget_tokens; }

  std::byte* const state_;
  const StateLayout& layout_;
};

}  // namespace clusterkv::gpu::host
