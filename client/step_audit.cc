#include "client/step_audit.h"

#include <string>
#include <utility>
#include <vector>

#include "gpu/selection.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {

absl::StatusOr<std::unique_ptr<StepAudit>> StepAudit::Create(gpu::Device& device,
                                                             const gpu::Shape& shape,
                                                             size_t sequences, double rate) {
  CKV_ASSIGN_OR_RETURN(auto lse, device.Allocate(sequences * shape.q_heads * sizeof(float)));
  return std::unique_ptr<StepAudit>(new StepAudit(shape, sequences, rate, std::move(lse)));
}

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

absl::StatusOr<v1::AuditStepRequest> StepAudit::Take(gpu::Stream& stream,
                                                     const gpu::BatchSlot& slot,
                                                     const gpu::QuerySource& queries,
                                                     const gpu::AttentionTarget& target,
                                                     uint32_t budget_tokens) const {
  const size_t row = shape_.row_bytes() / 2;
  std::string q(shape_.q_heads * row, '\0');
  std::string lse(shape_.q_heads * sizeof(float), '\0');
  uint32_t cut = 0;
  const auto enqueue = [&]() -> absl::Status {
    for (size_t head = 0; head < shape_.q_heads; ++head) {
      CKV_RETURN_IF_ERROR(stream.CopyAsync(
          &q[head * row], queries.q + index_ * queries.batch_stride + head * queries.head_stride,
          row));
    }
    CKV_RETURN_IF_ERROR(
        stream.CopyAsync(lse.data(), target.lse + index_ * target.lse_batch_stride, lse.size()));
    return stream.CopyAsync(&cut, slot.state + slot.layout->latch + offsetof(gpu::StepLatch, cut),
                            sizeof(cut));
  };
  const absl::Status enqueued = enqueue();
  const absl::Status passed = stream.Synchronize();  // always: it writes into what is above
  CKV_RETURN_IF_ERROR(enqueued);
  CKV_RETURN_IF_ERROR(passed);
  CKV_ASSIGN_OR_RETURN(const std::vector<int32_t> selected,
                       gpu::ReadSelection(stream, slot, layer_, budget_tokens));
  v1::AuditStepRequest request;
  request.set_layer(layer_);
  request.set_cut(cut);
  request.set_queries(std::move(q));
  request.set_lse(std::move(lse));
  request.mutable_selected_positions()->Assign(selected.begin(), selected.end());
  return request;
}

}  // namespace clusterkv::client
