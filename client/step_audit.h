// Chooses the steps of a direct batch that are audited, and takes what the daemon needs to compare
// them with exact attention: of one sequence and one layer the queries, what was selected, and the
// log-sum-exp of what was attended. Sequences and layers take turns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "clusterkv/v1/sequence.pb.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/shape.h"

namespace clusterkv::client {

// Thread-compatible.
class StepAudit {
 public:
  // rate: share of the steps, above 0, at most 1.
  static absl::StatusOr<std::unique_ptr<StepAudit>> Create(gpu::Device& device,
                                                           const gpu::Shape& shape,
                                                           size_t sequences, double rate);

  // A step has begun.
  void Begin();
  bool wants(uint32_t layer) const { return chosen_ && layer == layer_; }
  size_t index() const { return index_; }  // of the sequence in the batch
  // Attention leaves its log-sum-exps there.
  gpu::AttentionTarget WithLse(const gpu::AttentionTarget& target) const;
  // After Attend of a layer that it wants. Waits for the stream. `target` is WithLse's. The session
  // and the sequence are left to the caller.
  absl::StatusOr<v1::AuditStepRequest> Take(gpu::Stream& stream, const gpu::BatchSlot& slot,
                                            const gpu::QuerySource& queries,
                                            const gpu::AttentionTarget& target,
                                            uint32_t budget_tokens) const;

 private:
  StepAudit(const gpu::Shape& shape, size_t sequences, double rate,
            std::unique_ptr<gpu::DeviceMemory> lse)
      : shape_(shape), sequences_(sequences), rate_(rate), lse_(std::move(lse)) {}

  const gpu::Shape shape_;
  const size_t sequences_;
  const double rate_;
  const std::unique_ptr<gpu::DeviceMemory> lse_;  // float [sequences][q_heads]
  double due_ = 0;
  uint64_t audits_ = 0;
  bool chosen_ = false;  // the open step
  uint32_t layer_ = 0;
  size_t index_ = 0;
};

}  // namespace clusterkv::client
