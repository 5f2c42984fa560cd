// Sequences that decode together over one published context: states, queries, new tokens, outputs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/bench/backend.h"
#include "client/bench/published_context.h"
#include "gpu/decode_ops.h"

namespace clusterkv::client::bench {

// Clusters selected by (sequence * layers + layer) * kv_heads + head, in falling score.
using Selections = std::vector<std::vector<uint32_t>>;

class BatchState {
 public:
  enum class Fit { kAll, kAsManyAsFit };

  // At most `budget_tokens` a step. The context must outlive it.
  // Errors: RESOURCE_EXHAUSTED if the device's memory does not hold them, or with kAsManyAsFit
  // not even one.
  static absl::StatusOr<std::unique_ptr<BatchState>> Create(Backend& backend,
                                                            const PublishedContext& context,
                                                            uint32_t budget_tokens,
                                                            uint32_t sequences,
                                                            Fit fit = Fit::kAll);

  const gpu::StateLayout& layout() const { return layout_; }
  const PublishedContext& context() const { return context_; }
  uint32_t budget_tokens() const { return layout_.budget_tokens; }
  uint32_t sequences() const { return static_cast<uint32_t>(slots_.size()); }
  // The first `sequences` of them.
  gpu::Batch slots(uint32_t sequences) const { return gpu::Batch(slots_).subspan(0, sequences); }

  gpu::QuerySource queries(uint32_t layer) const;
  gpu::KvSource tokens() const;  // of every layer
  gpu::AttentionTarget target() const;

  // Back to the context's length.
  absl::Status Rewind(uint32_t sequences) const;
  // Rewinds, and a step begins.
  absl::Status Begin(uint32_t sequences) const;
  // What every layer selects for its queries. Enqueues, waits, copies back.
  absl::StatusOr<Selections> SelectAll(uint32_t sequences) const;
  // What the last Select of `layer` left, in Selections' place.
  absl::Status ReadSelection(uint32_t sequences, uint32_t layer, Selections& selections) const;
  // Sums over the first sequences and all layers, up to now.
  absl::StatusOr<gpu::LayerCounters> ReadCounters(uint32_t sequences) const;

  // Rows that a step of one layer attends to, for each KV head: sinks, selection, window.
  uint32_t attended_rows() const;
  uint32_t window_rows() const { return context_.options().tokens + 1 - context_.cut(); }

 private:
  BatchState(Backend& backend, const PublishedContext& context, const gpu::StateLayout& layout)
      : backend_(backend), context_(context), layout_(layout) {}
  absl::Status Prepare(uint32_t sequences, Fit fit);
  absl::Status AddSequence(uint32_t index);
  gpu::WriteTokensArgs WriteArgs(uint32_t index, uint32_t position, uint32_t count,
                                 const std::byte* rows) const;

  Backend& backend_;
  const PublishedContext& context_;
  const gpu::StateLayout layout_;
  std::unique_ptr<gpu::DeviceMemory> chunks_;          // pinned: one address
  std::unique_ptr<gpu::DeviceMemory> sinks_, window_;  // pinned rows [kv_heads][tokens]
  std::unique_ptr<gpu::DeviceMemory> queries_, tokens_, outputs_;
  uint32_t capacity_ = 0;  // sequences that these have room for
  std::vector<std::unique_ptr<gpu::DeviceMemory>> states_;
  std::vector<gpu::BatchSlot> slots_;
};

}  // namespace clusterkv::client::bench
