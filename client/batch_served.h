// Sequences whose steps the daemon runs: one FetchClusters a layer, over the batch's own connection
// or by gRPC. Inputs and outputs travel inline, or through an arena where they are too large for a
// message to be cheap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/client_session.h"
#include "client/decode_step.h"
#include "client/fetch_calls.h"
#include "client/kv_packer.h"
#include "client/sequence_impl.h"

namespace clusterkv::client {

// Thread-compatible, as DecodeBatch.
class ServedBatch final : public DecodeBatch {
 public:
  static constexpr size_t kMaxSequences = 256;  // FetchClusters.items

  // REQUIRES: 1 to kMaxSequences sequences, all served, of one session and shape.
  static absl::StatusOr<std::unique_ptr<DecodeBatch>> Create(std::vector<SequenceImpl*> sequences,
                                                             const BatchOptions& options);
  ~ServedBatch() override;

  absl::Status Prepare(uint32_t budget_tokens) override;
  absl::Status Complete() override;
  absl::Status Begin(uint32_t budget_tokens) override;
  absl::Status Append(uint32_t layer, const gpu::KvSource& source) override;
  absl::Status Attend(uint32_t layer, const gpu::QuerySource& queries,
                      const gpu::AttentionTarget& target) override;
  absl::StatusOr<std::vector<int32_t>> Selection(size_t index) override;
  absl::Status End() override;

 private:
  // Bytes of one sequence's inputs and outputs; in an arena each starts on 64 bytes.
  struct ItemLayout {
    explicit ItemLayout(const gpu::Shape& shape);
    uint64_t q_bytes, kv_bytes, output_bytes;
    uint64_t q, k, v, output;  // offsets
    uint64_t bytes;            // from one sequence to the next
  };

  ServedBatch(std::vector<SequenceImpl*> sequences, const BatchOptions& options);
  absl::Status OpenArena();
  bool uses_arena() const { return arena_.memory != nullptr; }
  absl::StatusOr<v1::FetchClustersRequest> MakeRequest(uint32_t layer,
                                                       const gpu::QuerySource& queries);
  uint64_t AnswerBytes() const;  // at most so many, of outputs and selections
  absl::Status PlaceInput(v1::TensorRef* place, const StridedRows& rows, uint64_t offset);
  absl::Status TakeReply(uint32_t layer, const v1::FetchClustersReply& reply,
                         const gpu::AttentionTarget& target);
  absl::Status CheckReply(const v1::FetchClustersReply& reply) const;
  absl::Status CopyOutputs(const v1::FetchClustersReply& reply, const gpu::AttentionTarget& target);

  DecodeStep step_;
  const BatchOptions options_;
  ClientSession& session_;
  const ItemLayout item_;
  FetchCalls calls_;
  // Only with an arena.
  Arena arena_;
  std::unique_ptr<gpu::Stream> stream_;
  bool in_doubt_ = false;  // a call may still be writing to the arena

  gpu::KvSource source_;                        // of the last Append
  std::vector<std::vector<int32_t>> selected_;  // of the last Attend, if wanted
};

}  // namespace clusterkv::client
