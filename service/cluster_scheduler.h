// Clusters and publishes segments on a thread and stream of its own, in batches over all the
// (layer, head) problems that are ready, whatever sequence they belong to.
//
//   Submit(job) ─► ready jobs ─► k-means of a whole batch ─► permute in place ─► done(results)
//   Publish(args) ─► metadata, then published_segments ─► done
//
// A batch is bounded by workspace bytes, so that one device burst stays short (design D6). Where
// the device has no memory for a batch, its jobs run one by one; a job that gets none even then
// fails alone, with RESOURCE_EXHAUSTED.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gpu/cluster_ops.h"
#include "gpu/device.h"
#include "service/slow_log.h"
#include "service/task_queue.h"

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
  double seconds = 0;          // this job's share of the batch's time
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

struct ClusterLoad {
  size_t waiting_jobs = 0, running_jobs = 0;
  double oldest_seconds = 0;  // since the oldest of them was submitted; 0: there is none
  uint64_t batches = 0;       // begun
};

// Thread-safe.
class ClusterScheduler {
 public:
  // `slow_log` hears of every batch, and outlives the scheduler.
  static absl::StatusOr<std::unique_ptr<ClusterScheduler>> Create(gpu::Device& device,
                                                                  SlowLog& slow_log);
  ~ClusterScheduler();

  void Submit(ClusterJob job);
  // `keep` lives until `done`, which runs on the scheduler's thread.
  void Publish(gpu::PublishArgs args, std::function<void(absl::Status)> done);
  // Finishes what is queued. Idempotent.
  void Stop() { queue_.Stop(); }

  ClusterLoad load() const;
  TaskQueueLoad thread_load() const { return queue_.load(); }

 private:
  using Clock = std::chrono::steady_clock;
  struct Ready {
    ClusterJob job;
    Clock::time_point submitted;
  };
  ClusterScheduler(gpu::Device& device, std::unique_ptr<gpu::Stream> stream, SlowLog& slow_log);

  // What a batch needs on the device while it runs, and what is left of it.
  struct BatchMemory {
    std::unique_ptr<gpu::DeviceMemory> workspace;  // permuted rows, counts, iterations
    std::unique_ptr<gpu::DeviceMemory>
        device_rows;                     // null where the device computes on host memory
    std::vector<ClusterResult> results;  // of each job
  };
  using Jobs = absl::Span<const ClusterJob>;

  std::vector<ClusterJob> TakeBatch();
  void RunReady();
  void RunBatch(Jobs batch);
  absl::StatusOr<BatchMemory> Allocate(Jobs batch);
  absl::StatusOr<std::vector<ClusterResult>> Cluster(Jobs batch, BatchMemory memory,
                                                     OperationTrace& trace);

  gpu::Device& device_;
  std::unique_ptr<gpu::Stream> stream_;
  SlowLog& slow_log_;
  mutable std::mutex mu_;
  std::deque<Ready> ready_;             // guarded by mu_
  size_t running_ = 0;                  // guarded by mu_; jobs
  Clock::time_point oldest_running_{};  // guarded by mu_
  uint64_t batches_ = 0;                // guarded by mu_
  TaskQueue queue_;                     // last: its thread uses the rest
};

}  // namespace clusterkv::service
