// Clusters and publishes segments on a thread and two streams of its own, in batches over all the
// (layer, head) problems that are ready, whatever sequence they belong to.
//
//   Submit(job) ─► ready jobs ─► k-means of a whole batch ─► permute in place ─► done(results)
//                                      stream "cluster"       stream "offload"
//   Publish(args) ─► metadata, then published_segments ─► done      (stream "cluster")
//
// A pipeline of two stages: while one batch is in the offload stage the next is clustered. Its
// turns are tasks of the thread's queue, so that publishing gets its own between them:
//
//   1. take a batch of what is ready, start its k-means
//   2. wait for the batch that is being offloaded, hand out its results, free its memory
//   3. wait for the k-means, start its offload
//
// So batches finish in order, and at most two have device memory. A batch is bounded by workspace
// bytes, so that one device burst stays short (design D6). Where the device has no memory for a
// second batch, it waits for the first; where it has none for a batch alone, its jobs run one by
// one; a job that gets none even then fails alone, with RESOURCE_EXHAUSTED.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cluster_ops.h"
#include "gpu/device.h"
#include "service/cluster_batch.h"
#include "service/slow_log.h"
#include "service/task_queue.h"

namespace clusterkv::service {

struct ClusterLoad {
  size_t waiting_jobs = 0, running_jobs = 0;  // running: in either stage
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
  // What `args` point to lives until `done`, which runs on the scheduler's thread. The clusters
  // were handed out by jobs' `done`, so their rows are in the host store, and no stream writes
  // them.
  void Publish(gpu::PublishArgs args, std::function<void(absl::Status)> done);
  // Finishes what is queued and what is being offloaded. Idempotent.
  void Stop() { queue_.Stop(); }

  ClusterLoad load() const;
  TaskQueueLoad thread_load() const { return queue_.load(); }

 private:
  using Clock = ClusterBatch::Clock;
  struct Ready {
    ClusterJob job;
    Clock::time_point submitted;
  };
  struct Running {  // a batch
    size_t jobs = 0;
    Clock::time_point oldest;
  };
  ClusterScheduler(gpu::Device& device, std::unique_ptr<gpu::Stream> cluster_stream,
                   std::unique_ptr<gpu::Stream> offload_stream, SlowLog& slow_log);

  std::unique_ptr<ClusterBatch> TakeBatch();  // null: nothing is ready
  // One turn of the pipeline.
  void RunReady();
  void FinishPending();
  void RunOneByOne(std::vector<ClusterJob> jobs);
  // The oldest batch is over.
  void EndBatch();

  gpu::Device& device_;
  const std::unique_ptr<gpu::Stream> cluster_stream_, offload_stream_;
  SlowLog& slow_log_;
  // Only the queue's thread uses these.
  std::unique_ptr<ClusterBatch> pending_;  // in the offload stage; null: none
  Clock::time_point last_end_{};           // of a batch
  mutable std::mutex mu_;
  std::deque<Ready> ready_;      // guarded by mu_
  std::deque<Running> running_;  // guarded by mu_; oldest first
  uint64_t batches_ = 0;         // guarded by mu_
  TaskQueue queue_;              // last: its thread uses the rest
};

}  // namespace clusterkv::service
