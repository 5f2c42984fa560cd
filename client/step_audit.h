// Chooses the steps of a direct batch that are audited, and has the batch's stream copy what the
// daemon needs to compare them with exact attention into the audit ring: of one sequence and one
// layer the queries, what was selected, and the log-sum-exp of what was attended. Sequences and
// layers take turns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/audit_helper.h"
#include "client/audit_ring.h"
#include "client/sequence_impl.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/shape.h"

namespace clusterkv::client {

// Thread-compatible.
class StepAudit {
 public:
  // rate: share of the steps, above 0, at most 1. Of sequences of one session and shape.
  // Errors: as ClientSession::AllocateArena.
  static absl::StatusOr<std::unique_ptr<StepAudit>> Create(
      const std::vector<SequenceImpl*>& sequences, double rate);
  StepAudit(const gpu::Shape& shape, size_t sequences, double rate,
            std::unique_ptr<gpu::DeviceMemory> lse, std::shared_ptr<AuditRing> ring);

  // A step has begun.
  void Begin();
  bool wants(uint32_t layer) const { return chosen_ && layer == layer_; }
  size_t index() const { return index_; }  // of the sequence in the batch
  // Attention leaves its log-sum-exps there.
  gpu::AttentionTarget WithLse(const gpu::AttentionTarget& target) const;
  // After Attend of a layer that it wants: enqueues the copies, if the ring has room. `target` is
  // WithLse's. Once more, if the layer was attended once more.
  absl::Status Take(gpu::Stream& stream, const gpu::BatchSlot& slot,
                    const gpu::QuerySource& queries, const gpu::AttentionTarget& target);
  // The step is over, and the stream has passed: what was taken of it, if anything. The session and
  // the sequence are left to the caller.
  std::optional<AuditSample> End();

 private:
  const gpu::Shape shape_;
  const size_t sequences_;
  const double rate_;
  const std::unique_ptr<gpu::DeviceMemory> lse_;  // float [sequences][q_heads]
  const std::shared_ptr<AuditRing> ring_;
  double due_ = 0;
  uint64_t audits_ = 0;
  // The open step.
  bool chosen_ = false;
  uint32_t layer_ = 0;
  size_t index_ = 0;
  std::optional<AuditSample> taken_;
};

}  // namespace clusterkv::client
