#include "gpu/decode_checks.h"

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu {

absl::Status CheckBatch(Batch batch, uint32_t layer) {
  const StateLayout* first = nullptr;
  for (size_t i = 0; i < batch.size(); ++i) {
    const BatchSlot& slot = batch[i];
    if (slot.active == 0) continue;
    if (slot.state == nullptr || slot.layout == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("batch slot ", i, " has no state or layout"));
    }
    const StateLayout& layout = *slot.layout;
    if (layer >= layout.layers) {
      return absl::InvalidArgumentError(absl::StrCat("layer is ", layer, " in batch slot ", i,
                                                     "; allowed: below ", layout.layers));
    }
    if (first == nullptr) first = slot.layout;
    if (layout.kv_heads != first->kv_heads || layout.group_size != first->group_size ||
        layout.head_dim != first->head_dim || layout.dtype != first->dtype) {
      return absl::InvalidArgumentError(
          absl::StrCat("batch slot ", i, " has another shape than those before it"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckWriteTokens(const WriteTokensArgs& args) {
  CKV_RETURN_IF_ERROR(CheckBatch(Batch(&args.slot, 1), args.layer_begin));
  if (args.slot.active == 0) return absl::OkStatus();
  const StateLayout& layout = *args.slot.layout;
  if (uint64_t{args.layer_begin} + args.layer_count > layout.layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layers ", args.layer_begin, " + ", args.layer_count, " of ", layout.layers));
  }
  if (uint64_t{args.position} + args.count > layout.max_tokens ||
      args.length_after > layout.max_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("position ", args.position, " + count ", args.count, " or length_after ",
                     args.length_after, " exceeds max_tokens, ", layout.max_tokens));
  }
  if (args.count > 0 && args.layer_count > 0 &&
      (args.source.k == nullptr || args.source.v == nullptr)) {
    return absl::InvalidArgumentError("source of K or V is null");
  }
  return absl::OkStatus();
}

absl::Status CheckAppend(Batch batch, uint32_t layer, const KvSource& source) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, layer));
  if (source.k != nullptr && source.v != nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError("source of K or V is null");
}

absl::Status CheckSelect(Batch batch, uint32_t layer, const QuerySource& queries,
                         uint32_t budget_tokens) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, layer));
  if (queries.q == nullptr) return absl::InvalidArgumentError("the queries are null");
  for (const BatchSlot& slot : batch) {
    if (slot.active == 0 || budget_tokens <= slot.layout->budget_tokens) continue;
    return absl::InvalidArgumentError(absl::StrCat("budget_tokens is ", budget_tokens,
                                                   "; allowed: at most the registered ",
                                                   slot.layout->budget_tokens));
  }
  return absl::OkStatus();
}

absl::Status CheckAttend(Batch batch, uint32_t layer, const QuerySource& queries,
                         const AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, layer));
  if (queries.q == nullptr) return absl::InvalidArgumentError("the queries are null");
  if (target.out == nullptr) return absl::InvalidArgumentError("the output is null");
  return absl::OkStatus();
}

absl::Status CheckResults(Batch batch, uint32_t layer, size_t room) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, layer));
  if (room >= batch.size()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("results have room for ", room, " slots of a batch of ", batch.size()));
}

}  // namespace clusterkv::gpu
