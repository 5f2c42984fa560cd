// A KV trace: post-RoPE Q, K and V of chosen layers of a real model over one text, as safetensors
// (format "clusterkv-trace/1"). The file is mapped, not copied; K and V of a token of one layer lie
// together over its heads, as the model wrote them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/mapping.h"
#include "gpu/shape.h"

namespace clusterkv::client::replay {

// Storage of one layer of the trace, in the trace's dtype.
struct TraceLayer {
  uint32_t index = 0;            // in the model
  const std::byte* k = nullptr;  // [tokens][kv_heads][head_dim]
  const std::byte* v = nullptr;  // [tokens][kv_heads][head_dim]
  const std::byte* q = nullptr;  // [steps][q_heads][head_dim]
};

// Immutable; move-only.
class Trace {
 public:
  // Reads the header and checks all of it, and that every value is finite.
  // Errors: NOT_FOUND, PERMISSION_DENIED; INVALID_ARGUMENT naming the file, the tensor or key, and
  // what is wrong with it.
  static absl::StatusOr<Trace> Open(const std::string& path);

  const std::string& path() const { return path_; }
  const std::string& model() const { return model_; }
  // Every layer of the trace is managed: shape().layers is layers().size().
  const gpu::Shape& shape() const { return shape_; }
  const std::vector<TraceLayer>& layers() const { return layers_; }  // in ascending index
  uint32_t prompt_tokens() const { return prompt_tokens_; }
  uint32_t steps() const { return steps_; }
  uint32_t tokens() const { return prompt_tokens_ + steps_; }
  float softmax_scale() const { return softmax_scale_; }

  // Strides in bytes.
  size_t head_bytes() const { return shape_.head_dim * gpu::SizeOf(shape_.dtype); }
  size_t kv_token_bytes() const { return shape_.kv_heads * head_bytes(); }
  size_t q_step_bytes() const { return shape_.q_heads * head_bytes(); }

 private:
  friend class TraceReader;

  std::string path_;
  gpu::Mapping mapping_;
  std::string model_;
  gpu::Shape shape_;
  std::vector<TraceLayer> layers_;
  uint32_t prompt_tokens_ = 0;
  uint32_t steps_ = 0;
  float softmax_scale_ = 0.0f;
};

}  // namespace clusterkv::client::replay
