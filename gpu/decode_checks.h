// What every backend checks before it enqueues an operation of a decode step, so that all refuse
// the same. Errors: INVALID_ARGUMENT with what is allowed.
#pragma once

#include <cstddef>
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
// `room`: slots that an operation's results have room for.
absl::Status CheckResults(Batch batch, uint32_t layer, size_t room);

}  // namespace clusterkv::gpu
