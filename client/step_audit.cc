#include "client/step_audit.h"

#include <algorithm>

#include "client/kv_packer.h"
#include "gpu/audit_layout.h"
#include "gpu/state_layout.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

struct AuditedStep {
  const gpu::BatchSlot& slot;
  StridedRows queries;
  const float* lse;  // [q_heads]
};

absl::Status CopyStep(gpu::Stream& stream, const AuditedStep& step, std::byte* destination) {
  const gpu::StateLayout& state = *step.slot.layout;
  const gpu::AuditLayout layout(state);
  KvPacker packer(stream);
  const auto copy = [&](uint64_t to, uint64_t from, size_t bytes) {
    return packer.Copy(destination + to, step.slot.state + from, bytes);
  };
  CKV_RETURN_IF_ERROR(
      copy(layout.cut, state.latch + offsetof(gpu::StepLatch, cut), sizeof(gpu::StepLatch::cut)));
  CKV_RETURN_IF_ERROR(
      packer.Copy(destination + layout.lse, step.lse, layout.q_heads * sizeof(float)));
  CKV_RETURN_IF_ERROR(packer.Pack(destination + layout.queries, step.queries));
  CKV_RETURN_IF_ERROR(
      copy(layout.counts, state.selected_count, layout.kv_heads * sizeof(uint32_t)));
  StridedRows choices{.data = step.slot.state + state.selected_cluster,
                      .head_stride = state.budget_tokens * sizeof(uint32_t),
                      .tokens = 1,
                      .heads = layout.kv_heads,
                      .row_bytes = layout.choices_bytes()};
  CKV_RETURN_IF_ERROR(packer.Pack(destination + layout.clusters, choices));
  choices.data = step.slot.state + state.selected_take;
  return packer.Pack(destination + layout.takes, choices);
}

}  // namespace

absl::StatusOr<std::unique_ptr<StepAudit>> StepAudit::Create(
    const std::vector<SequenceImpl*>& sequences, double rate) {
  ClientSession& session = sequences.front()->session();
  const gpu::Shape& shape = sequences.front()->options().shape;
  uint64_t slot_bytes = 0;
  for (const SequenceImpl* const sequence : sequences) {
    slot_bytes = std::max(slot_bytes, gpu::AuditLayout(sequence->layout()).bytes);
  }
  CKV_ASSIGN_OR_RETURN(std::shared_ptr<AuditRing> ring, session.AuditRingFor(slot_bytes));
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::DeviceMemory> lse,
                       session.device().Allocate(sequences.size() * shape.q_heads * sizeof(float)));
  return std::make_unique<StepAudit>(shape, sequences.size(), rate, std::move(lse),
                                     std::move(ring));
}

StepAudit::StepAudit(const gpu::Shape& shape, size_t sequences, double rate,
                     std::unique_ptr<gpu::DeviceMemory> lse, std::shared_ptr<AuditRing> ring)
    : shape_(shape),
      sequences_(sequences),
      rate_(rate),
      lse_(std::move(lse)),
      ring_(std::move(ring)) {}

void StepAudit::Begin() {
  due_ += rate_;
  chosen_ = due_ >= 1;
  if (!chosen_) return;
  due_ -= 1;
  layer_ = static_cast<uint32_t>(audits_ % shape_.layers);
  index_ = static_cast<size_t>(audits_ / shape_.layers % sequences_);
  ++audits_;
}

gpu::AttentionTarget StepAudit::WithLse(const gpu::AttentionTarget& target) const {
  gpu::AttentionTarget complete = target;
  if (complete.lse == nullptr) {
    complete.lse = reinterpret_cast<float*>(lse_->data());
    complete.lse_batch_stride = shape_.q_heads;
  }
  return complete;
}

absl::Status StepAudit::Take(gpu::Stream& stream, const gpu::BatchSlot& slot,
                             const gpu::QuerySource& queries, const gpu::AttentionTarget& target) {
  if (!taken_.has_value()) {
    auto room = AuditRing::Take(ring_, gpu::AuditLayout(*slot.layout).bytes);
    if (!room.has_value()) return absl::OkStatus();
    v1::AuditStepRequest request;
    request.set_layer(layer_);
    *request.mutable_slot() = room->range();
    taken_.emplace(AuditSample{.slot = std::move(*room), .request = std::move(request)});
  }
  const AuditedStep step{.slot = slot,
                         .queries = {.data = queries.q + index_ * queries.batch_stride,
                                     .head_stride = queries.head_stride,
                                     .tokens = 1,
                                     .heads = shape_.q_heads,
                                     .row_bytes = shape_.row_bytes() / 2},
                         .lse = target.lse + index_ * target.lse_batch_stride};
  return CopyStep(stream, step, taken_->slot.data());
}

std::optional<AuditSample> StepAudit::End() {
  std::optional<AuditSample> sample;
  if (taken_.has_value()) sample.emplace(std::move(*taken_));
  taken_.reset();
  return sample;
}

}  // namespace clusterkv::client
