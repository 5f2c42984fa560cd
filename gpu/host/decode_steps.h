// The pieces of work of HostDecodeOps: each for one sequence and one KV head (or one sequence),
// called with a slot that is active and current.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "gpu/decode_ops.h"
#include "gpu/host/state_view.h"

namespace clusterkv::gpu::host {

// Writes one token's K and V where its position belongs: sinks or window.
void WriteToken(const StateView& view, size_t head, uint32_t position, const std::byte* k,
                const std::byte* v);

// Query heads of one KV head, storage dtype, `head_stride` bytes apart.
struct GroupQueries {
  const std::byte* q = nullptr;
  size_t head_stride = 0;
};

// Cost: one product per query head and visible cluster, then O(clusters + selected log clusters).
void SelectHead(const StateView& view, uint32_t layer, uint32_t kv_head,
                const GroupQueries& queries, uint32_t budget_tokens);

// Errors: FAILED_PRECONDITION if a host chunk is not mapped here, INTERNAL if the block is damaged.
absl::Status FetchHead(const BatchSlot& slot, const StateView& view, uint32_t layer,
                       uint32_t kv_head);

// Output of the query heads of one KV head. lse may be null.
struct GroupTarget {
  float* out = nullptr;
  size_t head_stride = 0;  // in floats
  float* lse = nullptr;
};

void AttendHead(const StateView& view, uint32_t layer, uint32_t kv_head,
                const GroupQueries& queries, const GroupTarget& target);

// What a sequence without anything to attend to answers: zeros, and -inf as log-sum-exp.
void AttendNothing(const StateLayout& layout, const GroupTarget& target);

}  // namespace clusterkv::gpu::host
