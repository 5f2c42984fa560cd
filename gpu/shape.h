// The shape of a sequence's KV: fixed at registration.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "gpu/dtype.h"

namespace clusterkv::gpu {

struct Shape {
  uint32_t layers = 0;    // managed layers, 1..1024
  uint32_t kv_heads = 0;  // 1..1024
  uint32_t q_heads = 0;   // kv_heads * (1..16); query head h reads KV head h / group_size()
  uint32_t head_dim = 0;  // 64, 96, 128 or 256
  DType dtype = DType::kFp16;

  uint32_t group_size() const { return q_heads / kv_heads; }
  size_t problems() const { return size_t{layers} * kv_heads; }
  // K row and V row of one token of one (layer, KV head), side by side.
  size_t row_bytes() const { return 2 * head_dim * SizeOf(dtype); }
  // K and V of one token over all layers and heads.
  size_t token_bytes() const { return problems() * row_bytes(); }

  // Errors: INVALID_ARGUMENT naming the field and what is allowed.
  absl::Status Validate() const;

  bool operator==(const Shape&) const = default;
};

}  // namespace clusterkv::gpu
