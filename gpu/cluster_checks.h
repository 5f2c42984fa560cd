// What every backend checks before it enqueues an operation of the daemon's side, so that all
// refuse the same. Errors: INVALID_ARGUMENT with what is allowed.
#pragma once

#include "absl/status/status.h"
#include "gpu/cluster_ops.h"

namespace clusterkv::gpu {

absl::Status CheckStage(const StageArgs& args);
absl::Status CheckCluster(const ClusterArgs& args);
absl::Status CheckPermute(const PermuteArgs& args);
absl::Status CheckPublish(const PublishArgs& args);

}  // namespace clusterkv::gpu
