// Sequences that decode together in this process's own stream, over mapped memory: no RPC and no
// other process in a step's way (design D2).
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/decode_step.h"
#include "client/sequence_impl.h"
#include "client/step_audit.h"

namespace clusterkv::client {

// Thread-compatible, as DecodeBatch.
class DirectBatch final : public DecodeBatch {
 public:
  // REQUIRES: at least one sequence, all direct, of one session and shape.
  static absl::StatusOr<std::unique_ptr<DecodeBatch>> Create(std::vector<SequenceImpl*> sequences,
                                                             const BatchOptions& options);
  ~DirectBatch() override;

  absl::Status Prepare(uint32_t budget_tokens) override;
  absl::Status Complete() override;
  absl::Status Begin(uint32_t budget_tokens) override;
  absl::Status Append(uint32_t layer, const gpu::KvSource& source) override;
  absl::Status Attend(uint32_t layer, const gpu::QuerySource& queries,
                      const gpu::AttentionTarget& target) override;
  absl::StatusOr<std::vector<int32_t>> Selection(size_t index) override;
  absl::Status End() override;

 private:
  DirectBatch(std::vector<SequenceImpl*> sequences, const BatchOptions& options,
              std::unique_ptr<gpu::Stream> stream, std::unique_ptr<gpu::DeviceMemory> errors,
              std::unique_ptr<StepAudit> audit);
  gpu::DecodeOps& ops() { return step_.sequences().front()->session().device().decode_ops(); }
  absl::Status Open(uint32_t budget_tokens);
  absl::Status Close(absl::Status status);
  absl::Status CheckCaptured() const;
  void Submit(AuditSample sample) const;
  absl::Status StepErrors() const;

  DecodeStep step_;
  const BatchOptions options_;
  std::vector<gpu::BatchSlot> slots_;  // read by the stream while a step is open
  const std::unique_ptr<gpu::DeviceMemory> error_memory_;  // pinned
  const absl::Span<uint32_t> errors_;                      // written by the stream in End
  const std::unique_ptr<StepAudit> audit_;                 // null: no step is audited
  const std::unique_ptr<gpu::Stream> stream_;
  bool begun_ = false;            // BeginStep of the open step is enqueued
  uint32_t captured_budget_ = 0;  // of the step that was captured; 0: none yet
};

}  // namespace clusterkv::client
