// ClusterOps on the CPU: staging, permuting and publishing here, k-means in kmeans.cc.
#pragma once

#include "absl/status/status.h"
#include "gpu/cluster_ops.h"
#include "gpu/host/thread_pool.h"

namespace clusterkv::gpu::host {

// Thread-safe. Streams must be of the host backend: INVALID_ARGUMENT otherwise.
class HostClusterOps final : public ClusterOps {
 public:
  // `pool` must outlive this and all streams.
  explicit HostClusterOps(ThreadPool& pool) : pool_(pool) {}

  absl::Status Initialize(Stream& stream, std::byte* state, const StateLayout& layout,
                          uint32_t generation) override;
  absl::Status Stage(Stream& stream, StageArgs args) override;
  absl::Status Cluster(Stream& stream, ClusterArgs args) override;
  absl::Status Permute(Stream& stream, PermuteArgs args) override;
  absl::Status Publish(Stream& stream, PublishArgs args) override;

 private:
  ThreadPool& pool_;
};

}  // namespace clusterkv::gpu::host
