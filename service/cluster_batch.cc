#include "service/cluster_batch.h"

#include <algorithm>
#include <utility>

#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

constexpr size_t kAlignment = 256;

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

size_t RowBytes(const ClusterJob& job) { return 2 * job.head_dim * gpu::SizeOf(job.dtype); }

// Cuts one block of memory into aligned pieces.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  T* Take(size_t bytes) {
    std::byte* taken = base_ + offset_;
    offset_ += RoundUp(bytes);
    return reinterpret_cast<T*>(taken);
  }

 private:
  std::byte* base_;
  size_t offset_ = 0;
};

// Results of one head: order, sizes, centroids, value means.
size_t ResultBytesOfHead(const ClusterJob& job) {
  return RoundUp(job.tokens * sizeof(uint32_t)) + RoundUp(job.max_clusters * sizeof(uint32_t)) +
         2 * RoundUp(job.max_clusters * job.head_dim * gpu::SizeOf(job.dtype));
}

}  // namespace

size_t ClusterBatch::WorkspaceBytes(const ClusterJob& job) {
  return job.heads.size() * RoundUp(job.tokens * RowBytes(job));
}

absl::Status ClusterBatch::Start(gpu::Device& device, gpu::Stream& stream) {
  started_ = Clock::now();
  trace_ = jobs_.front().trace;
  trace_.End("queue_ms");
  absl::StatusOr<Memory> memory = Allocate(device);
  trace_.End("allocate_ms");
  CKV_RETURN_IF_ERROR(memory.status());
  memory_ = *std::move(memory);
  absl::Status status = device.cluster_ops().Cluster(stream, Prepare());
  trace_.End("enqueue_ms");
  if (status.ok()) return status;
  (void)stream.Synchronize();  // what it did enqueue uses the memory
  memory_ = {};
  return status;
}

absl::StatusOr<ClusterBatch::Memory> ClusterBatch::Allocate(gpu::Device& device) const {
  Memory memory;
  size_t row_bytes = 0, heads = 0;
  for (const ClusterJob& job : jobs_) {
    row_bytes += WorkspaceBytes(job);
    heads += job.heads.size();
  }
  CKV_ASSIGN_OR_RETURN(memory.workspace, device.Allocate(row_bytes + 2 * heads * sizeof(uint32_t)));
  if (!device.computes_on_host_memory()) {
    CKV_ASSIGN_OR_RETURN(memory.device_rows, device.Allocate(row_bytes));
  }
  for (const ClusterJob& job : jobs_) {
    CKV_ASSIGN_OR_RETURN(memory.results.emplace_back().memory,
                         device.Allocate(job.heads.size() * ResultBytesOfHead(job)));
  }
  return memory;
}

gpu::ClusterArgs ClusterBatch::Prepare() {
  problems_.clear();
  permute_ = {.row_bytes = RowBytes(jobs_[0]), .problems = {}};
  Carver workspace_carver(memory_.workspace->data());
  Carver row_carver(memory_.device_rows == nullptr ? nullptr : memory_.device_rows->data());
  for (size_t i = 0; i < jobs_.size(); ++i) {
    const ClusterJob& job = jobs_[i];
    Carver carver(memory_.results[i].memory->data());
    const size_t means_bytes = job.max_clusters * job.head_dim * gpu::SizeOf(job.dtype);
    for (const ClusterJob::Head& head : job.heads) {
      gpu::ClusterProblem problem{
          .rows = head.rows, .tokens = job.tokens, .clusters = job.clusters, .seed = head.seed};
      problem.order = carver.Take<uint32_t>(job.tokens * sizeof(uint32_t));
      problem.sizes = carver.Take<uint32_t>(job.max_clusters * sizeof(uint32_t));
      problem.centroids = carver.Take<std::byte>(means_bytes);
      problem.value_means = carver.Take<std::byte>(means_bytes);
      if (memory_.device_rows != nullptr) {
        problem.device_rows = row_carver.Take<std::byte>(job.tokens * RowBytes(job));
      }
      permute_.problems.push_back(
          {.rows = problem.device_rows != nullptr ? problem.device_rows : head.rows,
           .destination = head.rows,
           .workspace = workspace_carver.Take<std::byte>(job.tokens * RowBytes(job)),
           .order = problem.order,
           .tokens = job.tokens,
           .first_position = job.first_position,
           .positions = head.positions});
      problems_.push_back(problem);
    }
  }
  device_counts_ = workspace_carver.Take<uint32_t>(0);
  for (size_t i = 0; i < problems_.size(); ++i) {
    problems_[i].count = device_counts_ + i;
    problems_[i].iterations = device_counts_ + problems_.size() + i;
  }
  return {.head_dim = jobs_[0].head_dim,
          .dtype = jobs_[0].dtype,
          .iterations = jobs_[0].iterations,
          .largest_cluster_tokens = jobs_[0].largest_cluster_tokens,
          .center_keys = jobs_[0].center_keys,
          .problems = problems_};
}

absl::Status ClusterBatch::Offload(gpu::Device& device, gpu::Stream& cluster,
                                   gpu::Stream& offload) {
  const absl::Status clustered = cluster.Synchronize();
  trace_.End("device_ms");
  CKV_RETURN_IF_ERROR(clustered);
  // The counts first: into pageable memory CUDA copies at once, and the caller waits for all that
  // is before the copy in the stream.
  counts_.resize(2 * problems_.size());
  absl::Status status =
      offload.CopyAsync(counts_.data(), device_counts_, counts_.size() * sizeof(uint32_t));
  if (status.ok()) status = device.cluster_ops().Permute(offload, std::move(permute_));
  if (!status.ok()) (void)offload.Synchronize();  // what it did enqueue uses the memory
  return status;
}

ClusterBatch::Clock::time_point ClusterBatch::Finish(gpu::Stream& offload, Clock::time_point before,
                                                     SlowLog& slow_log) {
  const absl::Status finished = offload.Synchronize();
  const Clock::time_point end = Clock::now();
  const double jobs = static_cast<double>(jobs_.size());
  const double permute_seconds = trace_.End("permute_ms") / jobs;
  if (!finished.ok()) {
    Fail(finished, slow_log);
    return end;
  }
  const double seconds =
      std::chrono::duration<double>(end - std::max(started_, before)).count() / jobs;
  size_t next = 0;
  for (size_t i = 0; i < jobs_.size(); ++i) {
    ClusterResult& result = memory_.results[i];
    result.seconds = seconds;
    result.permute_seconds = permute_seconds;
    for (size_t head = 0; head < jobs_[i].heads.size(); ++head, ++next) {
      result.heads.push_back({.count = counts_[next],
                              .iterations = counts_[problems_.size() + next],
                              .sizes = problems_[next].sizes,
                              .centroids = problems_[next].centroids,
                              .value_means = problems_[next].value_means});
    }
    jobs_[i].done(std::move(result));
  }
  Report(slow_log);
  return end;
}

void ClusterBatch::Fail(const absl::Status& status, SlowLog& slow_log) {
  for (const ClusterJob& job : jobs_) job.done(status);
  Report(slow_log);
}

void ClusterBatch::Report(SlowLog& slow_log) const {
  size_t tokens = 0, problems = 0;
  for (const ClusterJob& job : jobs_) {
    tokens += job.tokens;
    problems += job.heads.size();
  }
  slow_log.Report(SlowLog::kClustering, trace_,
                  {{"jobs", jobs_.size()}, {"problems", problems}, {"tokens", tokens}});
}

}  // namespace clusterkv::service
