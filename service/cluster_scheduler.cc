#include "service/cluster_scheduler.h"

#include <utility>
#include <vector>

#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

// Rows in flight in one batch; larger batches no longer help the device, but delay others.
constexpr size_t kBatchBytes = 256ull << 20;

bool CanShareBatch(const ClusterJob& a, const ClusterJob& b) {
  return a.head_dim == b.head_dim && a.dtype == b.dtype && a.iterations == b.iterations &&
         a.largest_cluster_tokens == b.largest_cluster_tokens && a.center_keys == b.center_keys;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ClusterScheduler>> ClusterScheduler::Create(gpu::Device& device,
                                                                           SlowLog& slow_log) {
  CKV_ASSIGN_OR_RETURN(auto cluster_stream, device.CreateStream("cluster"));
  CKV_ASSIGN_OR_RETURN(auto offload_stream, device.CreateStream("offload"));
  return std::unique_ptr<ClusterScheduler>(
      new ClusterScheduler(device, std::move(cluster_stream), std::move(offload_stream), slow_log));
}

ClusterScheduler::ClusterScheduler(gpu::Device& device, std::unique_ptr<gpu::Stream> cluster_stream,
                                   std::unique_ptr<gpu::Stream> offload_stream, SlowLog& slow_log)
    : device_(device),
      cluster_stream_(std::move(cluster_stream)),
      offload_stream_(std::move(offload_stream)),
      slow_log_(slow_log),
      queue_("ckv-cluster", SIZE_MAX) {}

ClusterScheduler::~ClusterScheduler() { Stop(); }

void ClusterScheduler::Submit(ClusterJob job) {
  {
    std::lock_guard lock(mu_);
    ready_.push_back({.job = std::move(job), .submitted = Clock::now()});
  }
  queue_.Post([this] { RunReady(); });  // finds nothing if an earlier batch took the job
}

std::unique_ptr<ClusterBatch> ClusterScheduler::TakeBatch() {
  std::lock_guard lock(mu_);
  if (ready_.empty()) return nullptr;
  const Clock::time_point oldest = ready_.front().submitted;
  std::vector<ClusterJob> jobs;
  size_t bytes = 0;
  while (!ready_.empty()) {
    const ClusterJob& next = ready_.front().job;
    const size_t more = ClusterBatch::WorkspaceBytes(next);
    if (!jobs.empty() && (!CanShareBatch(jobs.front(), next) || bytes + more > kBatchBytes)) break;
    bytes += more;
    jobs.push_back(std::move(ready_.front().job));
    ready_.pop_front();
  }
  running_.push_back({.jobs = jobs.size(), .oldest = oldest});
  ++batches_;
  return std::make_unique<ClusterBatch>(std::move(jobs));
}

void ClusterScheduler::RunReady() {
  std::unique_ptr<ClusterBatch> next = TakeBatch();
  const bool overlaps = pending_ != nullptr;
  absl::Status status;
  if (next != nullptr) status = next->Start(device_, *cluster_stream_);
  FinishPending();
  if (next == nullptr) return;
  if (absl::IsResourceExhausted(status) && overlaps) {
    status = next->Start(device_, *cluster_stream_);  // in the memory of the batch before
  }
  if (absl::IsResourceExhausted(status) && next->size() > 1) {
    RunOneByOne(next->TakeJobs());
    return EndBatch();
  }
  if (status.ok()) status = next->Offload(device_, *cluster_stream_, *offload_stream_);
  if (!status.ok()) {
    next->Fail(status, slow_log_);
    return EndBatch();
  }
  pending_ = std::move(next);
  // A queue that is stopping takes no more tasks: then this turn is the last that is sure to come.
  if (!queue_.TryPost([this] { RunReady(); })) FinishPending();
}

void ClusterScheduler::FinishPending() {
  if (pending_ == nullptr) return;
  const std::unique_ptr<ClusterBatch> batch = std::move(pending_);
  last_end_ = batch->Finish(*offload_stream_, last_end_, slow_log_);
  EndBatch();
  // Its memory goes last: CUDA waits with that for what runs on the device, the next k-means.
}

void ClusterScheduler::RunOneByOne(std::vector<ClusterJob> jobs) {
  for (ClusterJob& job : jobs) {
    std::vector<ClusterJob> alone;
    alone.push_back(std::move(job));
    ClusterBatch batch(std::move(alone));
    absl::Status status = batch.Start(device_, *cluster_stream_);
    if (status.ok()) status = batch.Offload(device_, *cluster_stream_, *offload_stream_);
    if (status.ok()) {
      last_end_ = batch.Finish(*offload_stream_, last_end_, slow_log_);
    } else {
      batch.Fail(status, slow_log_);
    }
  }
}

void ClusterScheduler::EndBatch() {
  std::lock_guard lock(mu_);
  running_.pop_front();
}

ClusterLoad ClusterScheduler::load() const {
  std::lock_guard lock(mu_);
  ClusterLoad load{.waiting_jobs = ready_.size(), .batches = batches_};
  for (const Running& batch : running_) load.running_jobs += batch.jobs;
  if (running_.empty() && ready_.empty()) return load;
  const Clock::time_point oldest =
      running_.empty() ? ready_.front().submitted : running_.front().oldest;
  load.oldest_seconds = std::chrono::duration<double>(Clock::now() - oldest).count();
  return load;
}

void ClusterScheduler::Publish(gpu::PublishArgs args, std::function<void(absl::Status)> done) {
  queue_.Post([this, args = std::move(args), done = std::move(done)]() mutable {
    absl::Status status = device_.cluster_ops().Publish(*cluster_stream_, std::move(args));
    const absl::Status finished = cluster_stream_->Synchronize();
    done(status.ok() ? finished : status);
  });
}

}  // namespace clusterkv::service
