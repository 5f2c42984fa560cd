// A registered sequence: its state in this process, and what the daemon has been told of it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/client_session.h"
#include "client/decode_tail.h"
#include "client/prompt_progress.h"
#include "client/sequence_link.h"
#include "gpu/segment_plan.h"
#include "gpu/state_layout.h"

namespace clusterkv::client {

// Thread-compatible, as Sequence. The part below "steps" is for the batches.
class SequenceImpl final : public Sequence {
 public:
  static absl::StatusOr<std::unique_ptr<Sequence>> Register(
      const std::shared_ptr<ClientSession>& session, const SequenceOptions& options);
  ~SequenceImpl() override;

  uint64_t id() const override { return link_->id(); }
  const SequenceOptions& options() const override { return options_; }
  uint32_t length() const override { return length_; }
  absl::Status Ingest(const IngestRange& range, const gpu::KvSource& source,
                      absl::Duration timeout) override;
  absl::StatusOr<Published> WaitPublished(uint32_t length, absl::Duration timeout) override;
  Published published() const override { return link_->published(); }
  gpu::LayerCounters counters(uint32_t layer) const override;
  absl::Status Release() override;

  // --- Steps ----------------------------------------------------------------------------------
  ClientSession& session() const { return *session_; }
  bool direct() const { return options_.mode == FetchMode::kDirect; }
  const gpu::StateLayout& layout() const { return layout_; }
  // Direct only, while a token has room in the tail: for a step.
  gpu::BatchSlot slot() const;
  // May a step begin now? Errors: as DecodeBatch::Begin.
  absl::Status CheckStep() const;
  // Direct: room in the ring for the step's token. Errors: RESOURCE_EXHAUSTED.
  absl::Status ReserveTail();
  void OpenStep() { step_open_ = true; }
  void WithdrawStep() { step_open_ = false; }
  // The step is complete, and the stream has passed.
  void FinishStep();
  // The step failed or was abandoned: what the token left behind is undefined, so the sequence
  // cannot go on.
  void AbandonStep(const absl::Status& why);
  // Served: what a reply says.
  void AddCounters(uint32_t layer, const gpu::LayerCounters& added);

 private:
  SequenceImpl(std::shared_ptr<ClientSession> session, const SequenceOptions& options,
               const gpu::StateLayout& layout, std::shared_ptr<SequenceLink> link,
               uint32_t generation);

  // Not OK: released, failed, or the session is over.
  absl::Status Check() const;
  gpu::BatchSlot state_slot() const;
  absl::Status CheckSource(const gpu::KvSource& source) const;
  absl::Status SendPiece(const IngestRange& piece, const gpu::KvSource& source,
                         const Deadline& deadline);
  absl::Status CopyPiece(const IngestRange& piece, const gpu::KvSource& source, uint64_t offset);
  absl::Status WriteLength();
  v1::IngestTokensRequest RangeRequest(const IngestRange& range, uint64_t offset);
  // Hands over what has gathered in the tail.
  void SubmitTail();
  absl::Status FlushTail(const Deadline& deadline);
  // Is everything published that the segment rules allow at `length`, as far as is known here?
  // Before the prompt's end never beyond what was handed over: that may be prompt or decoded.
  bool KnownPublished(uint32_t length);
  uint32_t TailCapacity() const;
  std::vector<gpu::LayerCounters> ReadCounters() const;

  const std::shared_ptr<ClientSession> session_;
  const SequenceOptions options_;
  const gpu::StateLayout layout_;
  const std::shared_ptr<SequenceLink> link_;
  const uint32_t generation_;

  std::shared_ptr<gpu::DeviceMemory> state_;  // direct, until Release
  PromptProgress progress_;
  std::optional<IngestRange> unfinished_;  // of the last Ingest, if it failed on the way
  gpu::SegmentPlan plan_;                  // up to the longest length that was waited for
  DecodeTail tail_;
  std::vector<gpu::LayerCounters> counters_;  // served; direct: as Release left them
  uint64_t range_key_ = 0;
  uint32_t length_ = 0;
  bool step_open_ = false;
  bool released_ = false;
};

}  // namespace clusterkv::client
