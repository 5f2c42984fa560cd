// What the kernels of a decode step know of their batch: one table a stream, in device memory, that
// launches point to instead of carrying arguments (design D11). A captured graph can be replayed
// after the table has changed.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

#include "gpu/state_block.h"

namespace clusterkv::gpu::cuda {

constexpr uint32_t kMaxBatch = 512;
constexpr uint32_t kMaxGroup = 16;     // query heads that share a KV head
constexpr uint32_t kRowsPerPart = 64;  // rows that are worth a block of Attend

struct DeviceSlot {
  std::byte* state;
  const std::byte* const* host_chunks;
  std::byte* tail;       // where this step's token goes in the ingest ring; null: nowhere
  uint64_t tail_stride;  // bytes from a layer's K to its V, and from there to the next layer's K
  uint32_t generation;
  uint32_t active;
  uint32_t chunk_count;  // of host_chunks
  uint32_t unused;
  StateBlock block;
};

// A cluster on its way from the host store.
struct MissedCluster {
  const std::byte* source;  // its first row, mapped for the device
  uint32_t first_row;
  uint32_t before;  // missed rows of the clusters before it
};

// Memory of the layer that is being decoded, shared by the whole batch; for [slot][kv_head].
struct DecodeScratch {
  float* scores;          // [score_stride]: [group][clusters], then the group's keys in the first
  uint64_t* chosen;       // [chosen_stride]: key and id of what was selected, or of victims
  uint32_t* taken;        // [clusters]: tokens attended exactly, for the estimate
  uint32_t* keys;         // [3][clusters]: keys, sizes, rows, where shared memory cannot hold them
  MissedCluster* misses;  // [clusters]
  float* partials;        // [parts][group][head_dim]: output
  float2* partial_sums;   // [parts][group]: largest logit, sum
  uint32_t* select_tickets;  // [1]: blocks that have scored
  uint32_t* attend_tickets;  // [1]: blocks that have attended
  // Of each slot: host chunk addresses as begin-step found them, and the step that they are of.
  const std::byte** chunks;  // [chunk_stride]
  uint2* chunk_steps;        // [1]: generation and step; step 0 is none's
  uint32_t chunk_stride;
  uint32_t clusters;       // the most of any slot
  uint32_t score_stride;   // at least two rows
  uint32_t chosen_stride;  // the power of two from there
  uint32_t parts;
};

struct BatchTable {
  uint32_t count;
  DecodeScratch scratch;
  DeviceSlot slots[kMaxBatch];
};

// What a kernel found wrong: kept in pinned memory, one of the first is kept; Synchronize reports
// it.
enum class KernelFault : uint32_t {
  kNone = 0,
  kDamagedState = 1,     // an index in the state leads outside it
  kChunkNotMapped = 2,   // value: the host chunk
  kSizesDoNotAddUp = 3,  // value: the segment
  kOrderOutsideRun = 4,
};

}  // namespace clusterkv::gpu::cuda
