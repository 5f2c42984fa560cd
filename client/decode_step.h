// The order of calls within the steps of a batch, the same for direct and served.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "client/sequence_impl.h"

namespace clusterkv::client {

// Thread-compatible. Marks its sequences while a step is open; a step that is open when this is
// destroyed is abandoned.
class DecodeStep {
 public:
  explicit DecodeStep(std::vector<SequenceImpl*> sequences) : sequences_(std::move(sequences)) {}
  ~DecodeStep();
  DecodeStep(const DecodeStep&) = delete;
  DecodeStep& operator=(const DecodeStep&) = delete;

  const std::vector<SequenceImpl*>& sequences() const { return sequences_; }
  const gpu::Shape& shape() const { return sequences_.front()->options().shape; }
  uint32_t budget_tokens() const { return budget_tokens_; }  // of the open step
  bool open() const { return open_; }
  uint32_t last_attended() const { return next_layer_ - 1; }
  bool attended_any() const { return next_layer_ > 0; }

  // May a step begin? Changes nothing. Errors: as DecodeBatch::Begin.
  absl::Status CheckBegin(uint32_t budget_tokens) const;
  void Open(uint32_t budget_tokens);

  // Each layer once, rising: its Append, then its Attend. A call that failed may be repeated.
  absl::Status CheckAppend(uint32_t layer, const gpu::KvSource& source) const;
  void Appended() { appended_ = true; }
  absl::Status CheckAttend(uint32_t layer, const gpu::QuerySource& queries,
                           const gpu::AttentionTarget& target) const;
  void Attended();

  absl::Status CheckEnd() const;
  void Finish();
  void Abandon(const absl::Status& why);
  // The step was opened, and nothing of it has been enqueued.
  void Withdraw();

 private:
  absl::Status CheckLayer(uint32_t layer) const;
  // 0 becomes the sequences' own. Errors: INVALID_ARGUMENT.
  absl::StatusOr<uint32_t> ResolveBudget(uint32_t budget_tokens) const;

  const std::vector<SequenceImpl*> sequences_;  // at least one
  bool open_ = false;
  uint32_t budget_tokens_ = 0;
  uint32_t next_layer_ = 0;  // that has not been attended
  bool appended_ = false;    // next_layer_ is appended
};

}  // namespace clusterkv::client
