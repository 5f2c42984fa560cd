// Computes the layout of a sequence's state; and the entry of a batch that leads to it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "gpu/method_options.h"
#include "gpu/shape.h"
#include "gpu/state_block.h"

namespace clusterkv::gpu {

struct StateLayout : StateBlock {
  // `method` must be Resolved and valid, as `shape`; max_tokens 1..16,777,216.
  // Errors: INVALID_ARGUMENT where a bound is broken (also cache_tokens below
  // 2 * budget + largest cluster, which no later step could report).
  static absl::StatusOr<StateLayout> Create(const Shape& shape, const MethodOptions& method,
                                            uint32_t max_tokens);
};
static_assert(std::is_trivially_copyable_v<StateLayout>);

// One entry of a batch (design D11): a worker-owned table, updated between replays of a graph.
struct BatchSlot {
  std::byte* state = nullptr;
  const StateLayout* layout = nullptr;
  // Mapped address of each host chunk of the session in THIS process, by chunk index.
  // Pinned: the device reads it.
  const std::byte* const* host_chunks = nullptr;
  // Entries from the first that may be set: begin-step keeps a copy of them for its step, since a
  // look-up over PCIe costs a microsecond. Others are looked up where they are needed.
  uint32_t chunk_count = 0;
  // Where Append also leaves this step's token, in a range of the ingest ring: K of layer 0 here,
  // its V `tail_stride` bytes on, then the next layer's K, and so forth. Null: nowhere.
  std::byte* tail = nullptr;
  uint64_t tail_stride = 0;
  uint32_t generation = 0;
  uint32_t active = 0;  // 0: the slot is skipped
};

}  // namespace clusterkv::gpu
