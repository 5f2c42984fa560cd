#include "client/batch_direct.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/selection.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {

absl::StatusOr<std::unique_ptr<DecodeBatch>> DirectBatch::Create(
    std::vector<SequenceImpl*> sequences, const BatchOptions& options) {
  if (options.captured && options.stream == nullptr) {
    return absl::InvalidArgumentError("a captured batch needs the caller's stream");
  }
  gpu::Device& device = sequences.front()->session().device();
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::Stream> stream,
                       options.stream != nullptr ? device.WrapStream(options.stream)
                                                 : device.CreateStream("ckv-decode"));
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::DeviceMemory> errors,
                       device.AllocatePinned(sequences.size() * sizeof(uint32_t)));
  std::unique_ptr<StepAudit> audit;
  ClientSession& session = sequences.front()->session();
  if (session.audit() != nullptr && !options.captured) {
    // The daemon may have no room for a ring, or be draining: that is no reason not to decode.
    auto made = StepAudit::Create(sequences, session.options().audit_rate);
    if (made.ok()) audit = *std::move(made);
  }
  return std::unique_ptr<DecodeBatch>(new DirectBatch(
      std::move(sequences), options, std::move(stream), std::move(errors), std::move(audit)));
}

DirectBatch::DirectBatch(std::vector<SequenceImpl*> sequences, const BatchOptions& options,
                         std::unique_ptr<gpu::Stream> stream,
                         std::unique_ptr<gpu::DeviceMemory> errors,
                         std::unique_ptr<StepAudit> audit)
    : step_(std::move(sequences)),
      options_(options),
      slots_(step_.sequences().size()),
      error_memory_(std::move(errors)),
      errors_(reinterpret_cast<uint32_t*>(error_memory_->data()), slots_.size()),
      audit_(std::move(audit)),
      stream_(std::move(stream)) {}

DirectBatch::~DirectBatch() {
  // The stream reads members and the sequences' memory: it must have passed before they go.
  stream_->Synchronize().IgnoreError();
}

absl::Status DirectBatch::Open(uint32_t budget_tokens) {
  CKV_RETURN_IF_ERROR(step_.CheckBegin(budget_tokens));
  for (SequenceImpl* const sequence : step_.sequences()) {
    CKV_RETURN_IF_ERROR(sequence->ReserveTail());
  }
  for (size_t i = 0; i < slots_.size(); ++i) slots_[i] = step_.sequences()[i]->slot();
  CKV_RETURN_IF_ERROR(ops().LoadBatch(*stream_, slots_));
  step_.Open(budget_tokens);
  return absl::OkStatus();
}

absl::Status DirectBatch::CheckCaptured() const {
  if (options_.captured) return absl::OkStatus();
  return absl::FailedPreconditionError("the batch was made without captured");
}

absl::Status DirectBatch::Prepare(uint32_t budget_tokens) {
  CKV_RETURN_IF_ERROR(CheckCaptured());
  CKV_RETURN_IF_ERROR(Open(budget_tokens));
  if (captured_budget_ == 0 || captured_budget_ == step_.budget_tokens()) return absl::OkStatus();
  absl::Status differs = absl::FailedPreconditionError(absl::StrCat(
      "budget_tokens is ", step_.budget_tokens(), "; the captured step's is ", captured_budget_));
  step_.Withdraw();
  return differs;
}

absl::Status DirectBatch::Begin(uint32_t budget_tokens) {
  if (!options_.captured) {
    CKV_RETURN_IF_ERROR(Open(budget_tokens));
  } else if (!step_.open() || begun_ || captured_budget_ != 0) {
    return absl::FailedPreconditionError("a captured step begins once, after its first Prepare");
  } else if (budget_tokens != 0 && budget_tokens != step_.budget_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat("budget_tokens is ", budget_tokens,
                                                   ", but the step was prepared for ",
                                                   step_.budget_tokens()));
  }
  absl::Status begun = ops().BeginStep(*stream_, slots_);
  if (!begun.ok() && !options_.captured) step_.Withdraw();
  begun_ = begun.ok();
  if (begun_ && audit_ != nullptr) audit_->Begin();
  return begun;
}

absl::Status DirectBatch::Append(uint32_t layer, const gpu::KvSource& source) {
  CKV_RETURN_IF_ERROR(step_.CheckAppend(layer, source));
  if (!begun_) return absl::FailedPreconditionError("the step has not begun");
  CKV_RETURN_IF_ERROR(ops().Append(*stream_, slots_, layer, source));
  step_.Appended();
  return absl::OkStatus();
}

absl::Status DirectBatch::Attend(uint32_t layer, const gpu::QuerySource& queries,
                                 const gpu::AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(step_.CheckAttend(layer, queries, target));
  const bool audited = audit_ != nullptr && audit_->wants(layer);
  const gpu::AttentionTarget filled = audited ? audit_->WithLse(target) : target;
  CKV_RETURN_IF_ERROR(
      ops().DecodeLayer(*stream_, slots_, layer, queries, step_.budget_tokens(), filled));
  if (audited) {
    CKV_RETURN_IF_ERROR(audit_->Take(*stream_, slots_[audit_->index()], queries, filled));
  }
  step_.Attended();
  return absl::OkStatus();
}

void DirectBatch::Submit(AuditSample sample) const {
  const SequenceImpl& sequence = *step_.sequences()[audit_->index()];
  *sample.request.mutable_session() = sequence.session().reference();
  sample.request.set_sequence_id(sequence.id());
  sequence.session().audit()->Submit(std::move(sample));
}

absl::StatusOr<std::vector<int32_t>> DirectBatch::Selection(size_t index) {
  if (!options_.want_selection) {
    return absl::FailedPreconditionError("the batch was made without want_selection");
  }
  if (index >= slots_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", index, " of a batch of ", slots_.size()));
  }
  if (!step_.open() || !step_.attended_any()) {
    return absl::FailedPreconditionError("no layer of an open step has been attended");
  }
  return gpu::ReadSelection(*stream_, slots_[index], step_.last_attended(), step_.budget_tokens());
}

absl::Status DirectBatch::End() {
  CKV_RETURN_IF_ERROR(step_.CheckEnd());
  absl::Status status = ops().EndStep(*stream_, slots_, errors_);
  if (!options_.captured) return Close(status);
  if (status.ok()) captured_budget_ = step_.budget_tokens();
  return status;
}

absl::Status DirectBatch::Complete() {
  CKV_RETURN_IF_ERROR(CheckCaptured());
  if (captured_budget_ == 0) return absl::FailedPreconditionError("no step has been captured");
  if (!step_.open()) return absl::FailedPreconditionError("no step is prepared");
  return Close(absl::OkStatus());
}

// Waits for the step, whatever `status` its end was enqueued with.
absl::Status DirectBatch::Close(absl::Status status) {
  const absl::Status passed = stream_->Synchronize();
  if (status.ok()) status = passed;
  if (status.ok()) status = StepErrors();
  begun_ = false;
  // Of a step that failed it is dropped.
  std::optional<AuditSample> sample = audit_ != nullptr ? audit_->End() : std::nullopt;
  if (!status.ok()) {
    step_.Abandon(status);
    return status;
  }
  step_.Finish();
  if (sample.has_value()) Submit(std::move(*sample));
  return absl::OkStatus();
}

absl::Status DirectBatch::StepErrors() const {
  for (size_t i = 0; i < errors_.size(); ++i) {
    if (errors_[i] == 0) continue;
    const bool stale = (errors_[i] & gpu::kStaleGeneration) != 0;
    return absl::InternalError(
        absl::StrCat("sequence ", step_.sequences()[i]->id(), ": step error ", errors_[i],
                     stale ? " (stale generation)" : "",
                     (errors_[i] & gpu::kWindowOverflow) != 0 ? " (window overflow)" : ""));
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::client
