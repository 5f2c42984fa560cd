#include "client/wire_conversion.h"

namespace clusterkv::client {
namespace {

v1::DType ToWire(gpu::DType dtype) {
  switch (dtype) {
    case gpu::DType::kBf16:
      return v1::DTYPE_BF16;
    case gpu::DType::kFp16:
      return v1::DTYPE_FP16;
    case gpu::DType::kFp32:
      return v1::DTYPE_FP32;
  }
  return v1::DTYPE_UNSPECIFIED;
}

v1::GroupRule ToWire(gpu::GroupRule rule) {
  switch (rule) {
    case gpu::GroupRule::kSoftmax:
      return v1::GROUP_RULE_SOFTMAX;
    case gpu::GroupRule::kMean:
      return v1::GROUP_RULE_MEAN;
    case gpu::GroupRule::kMax:
      return v1::GROUP_RULE_MAX;
  }
  return v1::GROUP_RULE_UNSPECIFIED;
}

}  // namespace

v1::Shape ToWire(const gpu::Shape& shape) {
  v1::Shape wire;
  wire.set_layers(shape.layers);
  wire.set_kv_heads(shape.kv_heads);
  wire.set_q_heads(shape.q_heads);
  wire.set_head_dim(shape.head_dim);
  wire.set_dtype(ToWire(shape.dtype));
  return wire;
}

v1::Method ToWire(const gpu::MethodOptions& method) {
  v1::Method wire;
  wire.set_sink_tokens(method.sink_tokens);
  wire.set_min_window_tokens(method.min_window_tokens);
  wire.set_decode_segment_tokens(method.decode_segment_tokens);
  wire.set_prompt_segment_tokens(method.prompt_segment_tokens);
  wire.set_tokens_per_cluster(method.tokens_per_cluster);
  wire.set_kmeans_iterations(method.kmeans_iterations);
  wire.set_group(ToWire(method.group));
  wire.set_center_keys(method.center_keys);
  wire.set_estimate(method.estimate);
  wire.set_window_lag_segments(method.window_lag_segments);
  wire.set_budget_tokens(method.budget_tokens);
  wire.set_cache_tokens(method.cache_tokens);
  wire.set_softmax_scale(method.softmax_scale);
  wire.set_seed(method.seed);
  return wire;
}

v1::FetchMode ToWire(FetchMode mode) {
  return mode == FetchMode::kDirect ? v1::FETCH_MODE_DIRECT : v1::FETCH_MODE_SERVED;
}

}  // namespace clusterkv::client
