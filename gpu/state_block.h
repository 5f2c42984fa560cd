// Layout v1 of a sequence's device-resident state: everything a decode step needs, in one block of
// device memory. gpu/README.md draws it. Both processes compute it from the same registered
// parameters; the daemon never reads it back from memory that a worker can write.
//
// Offsets are bytes from the start of the block; every array starts on 256 bytes.
// Plain data, so that kernels see it, too; state_layout.h computes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "gpu/kinds.h"

namespace clusterkv::gpu {

constexpr uint32_t kStateLayoutVersion = 1;
constexpr uint32_t kStateMagic = 0x564b4c43;  // "CLKV"

// Where a published cluster lies in the host store. Written by the daemon, append-only.
struct ClusterEntry {
  uint32_t first_row;     // row of its first token in the (layer, head)'s row space [0, max_rows)
  uint32_t tokens;        // 1..largest_cluster_tokens
  uint32_t chunk;         // index of the host chunk of this session
  uint32_t chunk_offset;  // of its first row in that chunk, in units of 16 bytes
};

// The run of one segment of one (layer, head). Written by the daemon, append-only.
struct SegmentRun {
  uint32_t cluster_end;       // clusters of this (layer, head) up to and with this segment
  uint32_t chunk;             // host chunk
  uint32_t positions_offset;  // u32 positions in cluster order, in units of 16 bytes
  uint32_t first_row;         // of the segment: segment begin - sink_tokens
};

// Written by whoever runs the decode step; every kernel of a step reads only this for lengths.
struct StepLatch {
  uint32_t segments;  // published segments that this step sees
  uint32_t cut;       // first position that no published segment holds
  uint32_t length;    // tokens in the sequence, with this step's own after begin-step
  uint32_t step;      // steps begun, from 1
  uint32_t errors;    // StepError bits, sticky until EndStep or ReportLayer reports them
};

enum StepError : uint32_t {
  kStaleGeneration = 1,  // the slot's generation is not the state's: output 0, lse -inf
  kWindowOverflow = 2,   // length - cut exceeds the window ring
};

// One per layer; written by whoever fetches, only ever grows. Selected = hit + missed.
struct LayerCounters {
  uint64_t hit_clusters, missed_clusters;
  uint64_t hit_tokens, missed_tokens;  // of whole clusters
  uint64_t gathered_bytes;             // from the host store
};

// What one layer of a step left in a sequence's state.
struct LayerReport {
  uint32_t cut;
  uint32_t errors;  // StepError bits; if kStaleGeneration, the rest is 0
  LayerCounters counters;
};

struct StateHeader {
  uint32_t magic;
  uint32_t version;
  uint32_t generation;
};

// Offsets and dimensions; trivially copyable, so that a kernel can take it as it is.
struct StateBlock {
  uint32_t version;
  // Dimensions.
  uint32_t layers, kv_heads, group_size, head_dim;
  DType dtype;
  uint32_t sink_tokens, window_slots, max_tokens, max_rows, max_segments, max_clusters;
  uint32_t cache_tokens, budget_tokens;
  GroupRule group;
  uint32_t estimate;  // 0 or 1
  float softmax_scale;
  uint32_t unused;  // 0: blocks are compared byte by byte
  // Offsets, in order. H = kv_heads, row = K then V of head_dim elements.
  uint64_t header;              // StateHeader
  uint64_t published_segments;  // u32, alone in its 256 bytes; release/acquire
  uint64_t latch;               // StepLatch
  uint64_t counters;            // LayerCounters [layers]
  uint64_t segment_ends;        // u32 [max_segments]: end position of segment s
  uint64_t segment_runs;        // SegmentRun [layers][H][max_segments]
  uint64_t clusters;            // ClusterEntry [layers][H][max_clusters]
  uint64_t centroids;           // dtype [layers][H][max_clusters][head_dim]: mean raw key
  uint64_t value_means;         // dtype [layers][H][max_clusters][head_dim]
  uint64_t sinks;               // row [layers][H][sink_tokens]
  uint64_t window;              // row [layers][H][window_slots]; position p in p % window_slots
  uint64_t cache;               // row [layers][H][cache_tokens]
  uint64_t slot_of_row;         // u32 [layers][H][max_rows]: cache slot, valid while resident
  uint64_t last_used;           // u32 [layers][H][max_clusters]: step of last use, 0 = not resident
  uint64_t mean_scores;         // f32 [layers][H][max_clusters]: over all steps (cluster_worth.h)
  uint64_t free_slots;          // u32 [layers][H][cache_tokens]: stack of free cache slots
  uint64_t free_count;          // u32 [layers][H]
  // Scratch of the layer that is being decoded.
  uint64_t selected_count;    // u32 [H]: clusters selected
  uint64_t selected_cluster;  // u32 [H][budget_tokens]: cluster id, in falling score
  uint64_t selected_take;     // u32 [H][budget_tokens]: first tokens of it that are attended
  uint64_t slot_count;        // u32 [H]
  uint64_t slot_table;        // u32 [H][budget_tokens]: cache slot of each attended token
  uint64_t total_bytes;       // of the block

  size_t row_bytes() const { return 2 * head_dim * SizeOf(dtype); }
  size_t head_index(uint32_t layer, uint32_t kv_head) const {
    return size_t{layer} * kv_heads + kv_head;
  }
};
static_assert(std::is_trivially_copyable_v<StateBlock>);

// Typed views into a block.
template <typename T>
T* At(std::byte* state, uint64_t offset) {
  return reinterpret_cast<T*>(state + offset);
}
template <typename T>
const T* At(const std::byte* state, uint64_t offset) {
  return reinterpret_cast<const T*>(state + offset);
}

}  // namespace clusterkv::gpu
