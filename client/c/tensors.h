// The tensors of the C interface as the client takes them: checked, and strides of 0 replaced by
// those of a packed tensor.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "client/c/clusterkv.h"
#include "gpu/decode_ops.h"
#include "gpu/shape.h"

namespace clusterkv::client::c {

// `tokens`: of a layer in the packed tensor; 1 for a step. Errors: INVALID_ARGUMENT (null, or not a
// multiple of the element size).
absl::StatusOr<gpu::KvSource> ReadKv(const clusterkv_kv* kv, const gpu::Shape& shape,
                                     uint32_t tokens);

struct Attention {
  gpu::QuerySource queries;
  gpu::AttentionTarget target;
};

// Errors: as ReadKv.
absl::StatusOr<Attention> ReadAttention(const clusterkv_attention* attention,
                                        const gpu::Shape& shape);

}  // namespace clusterkv::client::c
