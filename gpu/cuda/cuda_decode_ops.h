// The operations of a decode step as kernels. Stateless: what they need lies in the stream.
#pragma once

#include "gpu/decode_ops.h"

namespace clusterkv::gpu::cuda {

// Thread-safe. Two launches a layer, append and DecodeLayer; 4 before compute capability 9.0:
// append, select, fetch, attend.
class CudaDecodeOps final : public DecodeOps {
 public:
  absl::Status WriteTokens(Stream& stream, const WriteTokensArgs& args) override;
  absl::Status LoadBatch(Stream& stream, Batch batch) override;
  absl::Status BeginStep(Stream& stream, Batch batch) override;
  absl::Status Append(Stream& stream, Batch batch, uint32_t layer, const KvSource& source) override;
  absl::Status Select(Stream& stream, Batch batch, uint32_t layer, const QuerySource& queries,
                      uint32_t budget_tokens) override;
  absl::Status Fetch(Stream& stream, Batch batch, uint32_t layer) override;
  absl::Status Attend(Stream& stream, Batch batch, uint32_t layer, const QuerySource& queries,
                      const AttentionTarget& target) override;
  absl::Status DecodeLayer(Stream& stream, Batch batch, uint32_t layer, const QuerySource& queries,
                           uint32_t budget_tokens, const AttentionTarget& target) override;
  absl::Status EndStep(Stream& stream, Batch batch, absl::Span<uint32_t> errors) override;
  absl::Status ReportLayer(Stream& stream, Batch batch, uint32_t layer,
                           absl::Span<LayerReport> reports) override;
};

}  // namespace clusterkv::gpu::cuda
