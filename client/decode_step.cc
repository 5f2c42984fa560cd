#include "client/decode_step.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {

DecodeStep::~DecodeStep() {
  if (open_) Abandon(absl::AbortedError("the batch was destroyed with the step open"));
}

absl::StatusOr<uint32_t> DecodeStep::ResolveBudget(uint32_t budget_tokens) const {
  uint32_t least = sequences_.front()->options().method.budget_tokens;
  uint32_t most = least;
  for (const SequenceImpl* const sequence : sequences_) {
    least = std::min(least, sequence->options().method.budget_tokens);
    most = std::max(most, sequence->options().method.budget_tokens);
  }
  if (budget_tokens > least) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget_tokens is ", budget_tokens, "; allowed: at most ", least));
  }
  if (budget_tokens > 0) return budget_tokens;
  if (least == most) return least;
  return absl::InvalidArgumentError(absl::StrCat(
      "budget_tokens is 0, but the sequences' own are between ", least, " and ", most));
}

absl::Status DecodeStep::CheckBegin(uint32_t budget_tokens) const {
  if (open_) return absl::FailedPreconditionError("a step of this batch is open");
  CKV_RETURN_IF_ERROR(ResolveBudget(budget_tokens).status());
  for (const SequenceImpl* const sequence : sequences_) {
    CKV_RETURN_IF_ERROR(sequence->CheckStep());
  }
  return absl::OkStatus();
}

void DecodeStep::Open(uint32_t budget_tokens) {
  budget_tokens_ = *ResolveBudget(budget_tokens);  // checked by CheckBegin
  open_ = true;
  next_layer_ = 0;
  appended_ = false;
  for (SequenceImpl* const sequence : sequences_) sequence->OpenStep();
}

absl::Status DecodeStep::CheckLayer(uint32_t layer) const {
  if (!open_) return absl::FailedPreconditionError("no step is open");
  if (layer >= shape().layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, "; allowed: below ", shape().layers));
  }
  if (layer != next_layer_) {
    return absl::FailedPreconditionError(
        absl::StrCat("layer ", layer, "; expected ", next_layer_, " next"));
  }
  return absl::OkStatus();
}

absl::Status DecodeStep::CheckAppend(uint32_t layer, const gpu::KvSource& source) const {
  CKV_RETURN_IF_ERROR(CheckLayer(layer));
  if (source.k == nullptr || source.v == nullptr) {
    return absl::InvalidArgumentError("k or v is null");
  }
  if (appended_) {
    return absl::FailedPreconditionError(absl::StrCat("layer ", layer, " is appended already"));
  }
  return absl::OkStatus();
}

absl::Status DecodeStep::CheckAttend(uint32_t layer, const gpu::QuerySource& queries,
                                     const gpu::AttentionTarget& target) const {
  CKV_RETURN_IF_ERROR(CheckLayer(layer));
  if (queries.q == nullptr || target.out == nullptr) {
    return absl::InvalidArgumentError("the queries or the output are null");
  }
  if (!appended_) {
    return absl::FailedPreconditionError(absl::StrCat("layer ", layer, " is not appended yet"));
  }
  return absl::OkStatus();
}

void DecodeStep::Attended() {
  ++next_layer_;
  appended_ = false;
}

absl::Status DecodeStep::CheckEnd() const {
  if (!open_) return absl::FailedPreconditionError("no step is open");
  if (next_layer_ == shape().layers) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("the step has attended ", next_layer_, " of ", shape().layers, " layers"));
}

void DecodeStep::Finish() {
  open_ = false;
  for (SequenceImpl* const sequence : sequences_) sequence->FinishStep();
}

void DecodeStep::Abandon(const absl::Status& why) {
  open_ = false;
  for (SequenceImpl* const sequence : sequences_) sequence->AbandonStep(why);
}

void DecodeStep::Withdraw() {
  open_ = false;
  for (SequenceImpl* const sequence : sequences_) sequence->WithdrawStep();
}

}  // namespace clusterkv::client
