// ClusterOps as kernels and copies: rows come from pinned host memory, are clustered and permuted
// in device memory, and go back in one large copy for each run.
#pragma once

#include "gpu/cluster_ops.h"

namespace clusterkv::gpu::cuda {

// Thread-safe. Streams must be of the cuda backend, dtype bf16 or fp16, rows and means on 16 bytes:
// INVALID_ARGUMENT otherwise.
class CudaClusterOps final : public ClusterOps {
 public:
  absl::Status Initialize(Stream& stream, std::byte* state, const StateLayout& layout,
                          uint32_t generation) override;
  absl::Status Stage(Stream& stream, StageArgs args) override;
  absl::Status Cluster(Stream& stream, ClusterArgs args) override;
  absl::Status Permute(Stream& stream, PermuteArgs args) override;
  absl::Status Publish(Stream& stream, PublishArgs args) override;
};

}  // namespace clusterkv::gpu::cuda
