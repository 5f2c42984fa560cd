// Jobs of clustering that run together, their device memory, and the two stages that they go
// through. Each stage has a stream, so that one batch's rows go back to the host while the next
// one's come to the device and are clustered: the bus carries both directions at once.
//
//   stream   cluster                          offload
//   Start    rows to the device, k-means
//   Offload  waits                            counts, rows into cluster order, back to the host
//   Finish                                    waits ─► done of each job
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cluster_ops.h"
#include "gpu/device.h"
#include "service/slow_log.h"

namespace clusterkv::service {

// The clusters of one KV head, in device memory of the result.
struct HeadClusters {
  uint32_t count = 0;
  uint32_t iterations = 0;  // of k-means
  const uint32_t* sizes = nullptr;
  const std::byte* centroids = nullptr;
  const std::byte* value_means = nullptr;
};

struct ClusterResult {
  std::unique_ptr<gpu::DeviceMemory> memory;
  std::vector<HeadClusters> heads;
  // This job's share of its batch's time, from the start, or from the end of the batch before if
  // that was later: what two batches do at once counts once, for the first.
  double seconds = 0;
  double permute_seconds = 0;  // and of the part of it that wrote rows into the host store
};

// One layer of one segment.
struct ClusterJob {
  struct Head {
    std::byte* rows = nullptr;  // staged; permuted in place
    uint32_t* positions = nullptr;
    uint64_t seed = 0;
  };
  uint32_t tokens = 0;
  uint32_t first_position = 0;
  uint32_t clusters = 0;      // k
  uint32_t max_clusters = 0;  // after splits
  // The same in all jobs of a batch.
  uint32_t head_dim = 0;
  gpu::DType dtype = gpu::DType::kFp16;
  uint32_t iterations = 0;
  uint32_t largest_cluster_tokens = 0;
  bool center_keys = false;

  std::vector<Head> heads;
  OperationTrace trace{};                                   // since it was ready
  std::function<void(absl::StatusOr<ClusterResult>)> done;  // on the scheduler's thread
};

// For one thread. Ends with Finish or Fail, which alone run the jobs' `done`. Streams have passed
// whatever uses its memory before that is freed, also after an error.
class ClusterBatch {
 public:
  using Clock = std::chrono::steady_clock;

  // REQUIRES: at least one job.
  explicit ClusterBatch(std::vector<ClusterJob> jobs) : jobs_(std::move(jobs)) {}

  // Rows of a job, once; a device of its own memory takes them twice.
  static size_t WorkspaceBytes(const ClusterJob& job);
  size_t size() const { return jobs_.size(); }
  // Before Start, or after it failed.
  std::vector<ClusterJob> TakeJobs() { return std::move(jobs_); }

  // Takes memory and enqueues k-means. After an error nothing of it is left on the device, and it
  // may be tried again. Errors: RESOURCE_EXHAUSTED, those of the device.
  absl::Status Start(gpu::Device& device, gpu::Stream& stream);
  // Waits for k-means on `cluster`, then enqueues the rest on `offload`.
  absl::Status Offload(gpu::Device& device, gpu::Stream& cluster, gpu::Stream& offload);
  // Waits for it. `before`: the end of the batch before. Returns this one's.
  Clock::time_point Finish(gpu::Stream& offload, Clock::time_point before, SlowLog& slow_log);
  // After an error of Start or Offload.
  void Fail(const absl::Status& status, SlowLog& slow_log);

 private:
  // What a batch needs on the device while it runs, and what is left of it.
  struct Memory {
    std::unique_ptr<gpu::DeviceMemory> workspace;  // permuted rows, counts, iterations
    std::unique_ptr<gpu::DeviceMemory>
        device_rows;                     // null where the device computes on host memory
    std::vector<ClusterResult> results;  // of each job
  };

  absl::StatusOr<Memory> Allocate(gpu::Device& device) const;
  // Cuts the memory into pieces: permute_, device_counts_, and what is returned.
  gpu::ClusterArgs Prepare();
  void Report(SlowLog& slow_log) const;

  std::vector<ClusterJob> jobs_;
  OperationTrace trace_;         // of the job that waited longest
  Clock::time_point started_{};  // the last try
  Memory memory_;
  std::vector<gpu::ClusterProblem> problems_;  // of all jobs' heads
  gpu::PermuteArgs permute_;
  uint32_t* device_counts_ = nullptr;  // all counts, then all iterations: one copy brings them
  std::vector<uint32_t> counts_;       // here
};

}  // namespace clusterkv::service
