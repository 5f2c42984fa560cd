// The operations of a decode step (design section 3, steps 4 to 7), batched over sequences.
//
//   begin-step ─► per layer: append ─► select ─► fetch ─► attend ─► ... ─► end-step
//                                      └─── decode-layer ───┘
//
// Each call enqueues on a stream and returns; it allocates nothing and waits for nothing. Within a
// step all operations read their lengths from the state's StepLatch, which begin-step wrote once.
// K, V, queries and outputs lie where the device can reach them: for `cuda` in its memory or pinned
// on the host. A slot whose generation is not the state's gives zero output, -inf log-sum-exp and
// an error bit. All arguments must stay valid until the stream has passed. Shapes are checked when
// enqueued: INVALID_ARGUMENT, and nothing is enqueued.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gpu/device.h"
#include "gpu/state_layout.h"

namespace clusterkv::gpu {

// New K and V, storage dtype; the innermost head_dim is contiguous. Strides in bytes.
struct KvSource {
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
  size_t batch_stride = 0;  // between sequences of a batch (Append)
  size_t layer_stride = 0;  // between layers (WriteTokens)
  size_t token_stride = 0;  // between tokens (WriteTokens)
  size_t head_stride = 0;   // between KV heads
};

// Queries, storage dtype: [batch][q_heads][head_dim], innermost contiguous. Strides in bytes.
struct QuerySource {
  const std::byte* q = nullptr;
  size_t batch_stride = 0;
  size_t head_stride = 0;
};

// fp32. out: [batch][q_heads][head_dim]; lse: [batch][q_heads], natural logarithm; lse may be null.
struct AttentionTarget {
  float* out = nullptr;
  size_t batch_stride = 0;  // in floats
  size_t head_stride = 0;   // in floats
  float* lse = nullptr;
  size_t lse_batch_stride = 0;  // in floats
};

// A range of tokens at positions known to the host: the prompt as it passes.
struct WriteTokensArgs {
  BatchSlot slot;
  uint32_t layer_begin = 0;
  uint32_t layer_count = 0;
  uint32_t position = 0;
  uint32_t count = 0;
  KvSource source = {};
  uint32_t length_after = 0;  // sets the latch's length; 0 leaves it
};

using Batch = absl::Span<const BatchSlot>;

class DecodeOps {
 public:
  virtual ~DecodeOps() = default;

  // Sinks and window take the tokens of a range; of more than the window ring holds, the newest.
  virtual absl::Status WriteTokens(Stream& stream, const WriteTokensArgs& args) = 0;
  // Makes the batch known to the device. Every operation does it where the batch differs from the
  // last one's on this stream, but one that is being captured in a graph cannot: load the batch
  // before the capture, and again before each replay after which its slots have changed.
  virtual absl::Status LoadBatch(Stream& stream, Batch batch) = 0;
  // Latches published_segments (acquire) into segments and cut, and counts the new token.
  virtual absl::Status BeginStep(Stream& stream, Batch batch) = 0;
  // This step's token of one layer goes to the sinks or the window, and to the slot's tail.
  virtual absl::Status Append(Stream& stream, Batch batch, uint32_t layer,
                              const KvSource& source) = 0;
  // Scores every centroid, q·mu * scale; the group rule; clusters in falling order to the budget
  // (ties: lower id first), the last one trimmed to its first tokens that fit. With a budget, every
  // cluster's score goes into its running mean (cluster_worth.h).
  virtual absl::Status Select(Stream& stream, Batch batch, uint32_t layer,
                              const QuerySource& queries, uint32_t budget_tokens) = 0;
  // Look-up, eviction of the clusters of the least worth, gather of the misses, whole clusters; the
  // slot table; counters.
  virtual absl::Status Fetch(Stream& stream, Batch batch, uint32_t layer) = 0;
  // Exact softmax attention over sinks + slot table + window (and the estimate, if asked for).
  virtual absl::Status Attend(Stream& stream, Batch batch, uint32_t layer,
                              const QuerySource& queries, const AttentionTarget& target) = 0;
  // Select, Fetch and Attend, in as few launches as the backend can, with the same outcome but for
  // the slot table, which they need not leave.
  virtual absl::Status DecodeLayer(Stream& stream, Batch batch, uint32_t layer,
                                   const QuerySource& queries, uint32_t budget_tokens,
                                   const AttentionTarget& target) = 0;
  // Writes each slot's StepError bits to errors[i] and clears them. In host memory; to be captured
  // in a graph it must be pinned.
  virtual absl::Status EndStep(Stream& stream, Batch batch, absl::Span<uint32_t> errors) = 0;
  // Writes the layer's counters, the step's cut and, as EndStep, its errors to reports[i], pinned
  // memory.
  virtual absl::Status ReportLayer(Stream& stream, Batch batch, uint32_t layer,
                                   absl::Span<LayerReport> reports) = 0;
};

}  // namespace clusterkv::gpu
