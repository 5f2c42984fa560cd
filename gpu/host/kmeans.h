// Spherical k-means of one problem on the CPU; see ClusterOps::Cluster for what the results mean.
#pragma once

#include "absl/types/span.h"
#include "gpu/cluster_ops.h"
#include "gpu/host/thread_pool.h"

namespace clusterkv::gpu::host {

// All problems, over all threads of the pool. Results do not depend on the number of threads.
void ClusterProblems(ThreadPool& pool, const ClusterArgs& args);

}  // namespace clusterkv::gpu::host
