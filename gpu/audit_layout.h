// A sampled layer of one decode step of one sequence, as the worker's stream leaves it in a slot of
// its audit ring and the daemon reads it: what the layer was asked, what it chose, what it
// attended.
//
//   cut       u32                    first position that no published segment holds, as the step
//                                    latched it
//   lse       f32   [q_heads]        natural logarithm of the softmax's sum over what was attended
//   queries   dtype [q_heads][head_dim]
//   counts    u32   [kv_heads]       clusters selected
//   clusters  u32   [kv_heads][choices]   their ids, in falling score; beyond the count anything
//   takes     u32   [kv_heads][choices]   first tokens of each that were attended
//
// Offsets are bytes from the start of the slot, and everything starts on 64 bytes. Both processes
// compute it from the layout of the sequence's state.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gpu/state_block.h"

namespace clusterkv::gpu {

struct AuditLayout {
  explicit AuditLayout(const StateBlock& block)
      : kv_heads(block.kv_heads),
        q_heads(block.kv_heads * block.group_size),
        choices(std::min(block.budget_tokens, block.max_clusters)),
        query_bytes(block.row_bytes() / 2) {
    const auto add = [this](uint64_t added) {
      const uint64_t offset = bytes;
      bytes += (added + kAlignment - 1) / kAlignment * kAlignment;
      return offset;
    };
    cut = add(sizeof(uint32_t));
    lse = add(q_heads * sizeof(float));
    queries = add(q_heads * query_bytes);
    counts = add(kv_heads * sizeof(uint32_t));
    clusters = add(kv_heads * choices_bytes());
    takes = add(kv_heads * choices_bytes());
  }

  static constexpr uint64_t kAlignment = 64;

  uint32_t kv_heads, q_heads;
  uint32_t choices;    // the most clusters that a KV head selects
  size_t query_bytes;  // of one query head
  uint64_t bytes = 0;
  // Offsets.
  uint64_t cut, lse, queries, counts, clusters, takes;

  size_t choices_bytes() const { return choices * sizeof(uint32_t); }  // of one KV head
};

}  // namespace clusterkv::gpu
