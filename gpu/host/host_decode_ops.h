// DecodeOps on the CPU. Checks and enqueues here; the work itself stands in host_select.cc,
// host_fetch.cc and host_attend.cc, and is spread over the pool by (slot, KV head).
#pragma once

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gpu/decode_ops.h"
#include "gpu/host/thread_pool.h"

namespace clusterkv::gpu::host {

// Thread-safe. Streams must be of the host backend: INVALID_ARGUMENT otherwise.
class HostDecodeOps final : public DecodeOps {
 public:
  // `pool` must outlive this and all streams.
  explicit HostDecodeOps(ThreadPool& pool) : pool_(pool) {}

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

 private:
  ThreadPool& pool_;
};

}  // namespace clusterkv::gpu::host
