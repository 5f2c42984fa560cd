// What every backend checks before it enqueues an operation of a decode step, so that all refuse
// the same. Errors: INVALID_ARGUMENT with what is allowed.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "gpu/decode_ops.h"

namespace clusterkv::gpu {

// One tensor serves the whole batch, so its slots agree on the shape of a token.
absl::Status CheckBatch(Batch batch, uint32_t layer);
absl::Status CheckWriteTokens(const WriteTokensArgs& args);
absl::Status CheckAppend(Batch batch, uint32_t layer, const KvSource& source);
absl::Status CheckSelect(Batch batch, uint32_t layer, const QuerySource& queries,
                         uint32_t budget_tokens);
absl::Status CheckAttend(Batch batch, uint32_t layer, const QuerySource& queries,
                         const AttentionTarget& target);
absl::Status CheckEndStep(Batch batch, absl::Span<uint32_t> errors);

}  // namespace clusterkv::gpu
