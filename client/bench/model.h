// The parts of a decode step of a Llama model that are not ours: products with random weights,
// norms and activations. RoPE and the embedding's look-up are left out: microseconds of a step.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "gpu/decode_ops.h"
#include "gpu/shape.h"

namespace clusterkv::client::bench {

// Llama-3.1-8B but for what a gpu::Shape says.
struct ModelSize {
  gpu::Shape shape;
  uint32_t hidden = 4096;
  uint32_t feed_forward = 14'336;
  uint32_t vocabulary = 128'256;

  uint32_t q_width() const { return shape.q_heads * shape.head_dim; }
  uint32_t kv_width() const { return shape.kv_heads * shape.head_dim; }
  double layer_weights() const {
    return static_cast<double>(hidden) * (q_width() + 2.0 * kv_width()) +
           static_cast<double>(q_width()) * hidden + 3.0 * hidden * feed_forward;
  }
  // Every one of them is read, and multiplied with each sequence's activations, in every step.
  double weights() const {
    return layer_weights() * shape.layers + static_cast<double>(vocabulary) * hidden;
  }
};

// All calls enqueue on the backend's stream, for the first `batch` sequences; they can be captured.
class Model {
 public:
  virtual ~Model() = default;

  virtual absl::Status Begin(uint32_t batch) = 0;  // hidden states of new tokens, always the same
  // Query, key and value of a layer, which lie where the next three say.
  virtual absl::Status Project(uint32_t layer, uint32_t batch) = 0;
  virtual gpu::QuerySource queries() const = 0;
  virtual gpu::KvSource tokens() const = 0;
  virtual gpu::AttentionTarget target() const = 0;
  // From the target on: output projection, feed-forward, norms.
  virtual absl::Status Finish(uint32_t layer, uint32_t batch) = 0;
  virtual absl::Status Logits(uint32_t batch) = 0;
};

}  // namespace clusterkv::client::bench
