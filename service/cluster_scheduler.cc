#include "service/cluster_scheduler.h"

#include <chrono>
#include <cstddef>
#include <utility>

#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

// Rows in flight in one batch; larger batches no longer help the device, but delay others.
constexpr size_t kBatchBytes = 256ull << 20;
constexpr size_t kAlignment = 256;

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

size_t RowBytes(const ClusterJob& job) { return 2 * job.head_dim * gpu::SizeOf(job.dtype); }

size_t WorkspaceBytes(const ClusterJob& job) {
  return job.heads.size() * RoundUp(job.tokens * RowBytes(job));
}

bool CanShareBatch(const ClusterJob& a, const ClusterJob& b) {
  return a.head_dim == b.head_dim && a.dtype == b.dtype && a.iterations == b.iterations &&
         a.largest_cluster_tokens == b.largest_cluster_tokens && a.center_keys == b.center_keys;
}

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

absl::StatusOr<std::unique_ptr<ClusterScheduler>> ClusterScheduler::Create(gpu::Device& device,
                                                                           SlowLog& slow_log) {
  CKV_ASSIGN_OR_RETURN(auto stream, device.CreateStream("cluster"));
  return std::unique_ptr<ClusterScheduler>(
      new ClusterScheduler(device, std::move(stream), slow_log));
}

ClusterScheduler::ClusterScheduler(gpu::Device& device, std::unique_ptr<gpu::Stream> stream,
                                   SlowLog& slow_log)
    : device_(device),
      stream_(std::move(stream)),
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

std::vector<ClusterJob> ClusterScheduler::TakeBatch() {
  std::lock_guard lock(mu_);
  std::vector<ClusterJob> batch;
  size_t bytes = 0;
  while (!ready_.empty()) {
    const ClusterJob& next = ready_.front().job;
    if (!batch.empty() &&
        (!CanShareBatch(batch.front(), next) || bytes + WorkspaceBytes(next) > kBatchBytes)) {
      break;
    }
    bytes += WorkspaceBytes(next);
    if (batch.empty()) oldest_running_ = ready_.front().submitted;
    batch.push_back(std::move(ready_.front().job));
    ready_.pop_front();
  }
  running_ = batch.size();
  batches_ += batch.empty() ? 0 : 1;
  return batch;
}

void ClusterScheduler::RunReady() {
  const std::vector<ClusterJob> batch = TakeBatch();
  if (batch.empty()) return;
  RunBatch(batch);
  std::lock_guard lock(mu_);
  running_ = 0;
}

ClusterLoad ClusterScheduler::load() const {
  std::lock_guard lock(mu_);
  ClusterLoad load{.waiting_jobs = ready_.size(), .running_jobs = running_, .batches = batches_};
  if (running_ == 0 && ready_.empty()) return load;
  const Clock::time_point oldest = running_ > 0 ? oldest_running_ : ready_.front().submitted;
  load.oldest_seconds = std::chrono::duration<double>(Clock::now() - oldest).count();
  return load;
}

void ClusterScheduler::RunBatch(Jobs batch) {
  const auto start = Clock::now();
  OperationTrace trace = batch.front().trace;  // waited longest
  trace.End("queue_ms");
  auto memory = Allocate(batch);
  trace.End("allocate_ms");
  if (absl::IsResourceExhausted(memory.status()) && batch.size() > 1) {
    for (size_t i = 0; i < batch.size(); ++i) RunBatch(batch.subspan(i, 1));
    return;
  }
  auto results = memory.ok() ? Cluster(batch, *std::move(memory), trace) : memory.status();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  for (size_t i = 0; i < batch.size(); ++i) {
    if (!results.ok()) {
      batch[i].done(results.status());
      continue;
    }
    (*results)[i].seconds = seconds / static_cast<double>(batch.size());
    batch[i].done(std::move((*results)[i]));
  }
  size_t tokens = 0, problems = 0;
  for (const ClusterJob& job : batch) {
    tokens += job.tokens;
    problems += job.heads.size();
  }
  slow_log_.Report(SlowLog::kClustering, trace,
                   {{"jobs", batch.size()}, {"problems", problems}, {"tokens", tokens}});
}

absl::StatusOr<ClusterScheduler::BatchMemory> ClusterScheduler::Allocate(Jobs batch) {
  BatchMemory memory;
  size_t row_bytes = 0, heads = 0;
  for (const ClusterJob& job : batch) {
    row_bytes += WorkspaceBytes(job);
    heads += job.heads.size();
  }
  CKV_ASSIGN_OR_RETURN(memory.workspace,
                       device_.Allocate(row_bytes + 2 * heads * sizeof(uint32_t)));
  if (!device_.computes_on_host_memory()) {
    CKV_ASSIGN_OR_RETURN(memory.device_rows, device_.Allocate(row_bytes));
  }
  for (const ClusterJob& job : batch) {
    CKV_ASSIGN_OR_RETURN(memory.results.emplace_back().memory,
                         device_.Allocate(job.heads.size() * ResultBytesOfHead(job)));
  }
  return memory;
}

absl::StatusOr<std::vector<ClusterResult>> ClusterScheduler::Cluster(Jobs batch, BatchMemory memory,
                                                                     OperationTrace& trace) {
  gpu::ClusterArgs cluster{.head_dim = batch[0].head_dim,
                           .dtype = batch[0].dtype,
                           .iterations = batch[0].iterations,
                           .largest_cluster_tokens = batch[0].largest_cluster_tokens,
                           .center_keys = batch[0].center_keys,
                           .problems = {}};
  gpu::PermuteArgs permute{.row_bytes = RowBytes(batch[0]), .problems = {}};
  Carver workspace_carver(memory.workspace->data());
  Carver row_carver(memory.device_rows == nullptr ? nullptr : memory.device_rows->data());
  std::vector<ClusterResult> results = std::move(memory.results);
  for (size_t i = 0; i < batch.size(); ++i) {
    const ClusterJob& job = batch[i];
    Carver carver(results[i].memory->data());
    const size_t means_bytes = job.max_clusters * job.head_dim * gpu::SizeOf(job.dtype);
    for (const ClusterJob::Head& head : job.heads) {
      gpu::ClusterProblem problem{
          .rows = head.rows, .tokens = job.tokens, .clusters = job.clusters, .seed = head.seed};
      problem.order = carver.Take<uint32_t>(job.tokens * sizeof(uint32_t));
      problem.sizes = carver.Take<uint32_t>(job.max_clusters * sizeof(uint32_t));
      problem.centroids = carver.Take<std::byte>(means_bytes);
      problem.value_means = carver.Take<std::byte>(means_bytes);
      if (memory.device_rows != nullptr) {
        problem.device_rows = row_carver.Take<std::byte>(job.tokens * RowBytes(job));
      }
      permute.problems.push_back(
          {.rows = problem.device_rows != nullptr ? problem.device_rows : head.rows,
           .destination = head.rows,
           .workspace = workspace_carver.Take<std::byte>(job.tokens * RowBytes(job)),
           .order = problem.order,
           .tokens = job.tokens,
           .first_position = job.first_position,
           .positions = head.positions});
      cluster.problems.push_back(problem);
    }
  }

  // All counts, then all iterations: one copy brings them back.
  auto* const device_counts = workspace_carver.Take<uint32_t>(0);
  for (size_t i = 0; i < cluster.problems.size(); ++i) {
    cluster.problems[i].count = device_counts + i;
    cluster.problems[i].iterations = device_counts + cluster.problems.size() + i;
  }
  const std::vector<gpu::ClusterProblem> problems = cluster.problems;
  std::vector<uint32_t> counts(2 * problems.size());
  absl::Status status = device_.cluster_ops().Cluster(*stream_, std::move(cluster));
  trace.End("enqueue_ms");
  if (status.ok()) status = stream_->Synchronize();  // so that the rows' way back is timed alone
  trace.End("device_ms");
  if (status.ok()) status = device_.cluster_ops().Permute(*stream_, std::move(permute));
  if (status.ok()) {
    status = stream_->CopyAsync(counts.data(), device_counts, counts.size() * sizeof(uint32_t));
  }
  const absl::Status finished = stream_->Synchronize();  // always: the memory is in use until then
  const double permute_seconds = trace.End("permute_ms") / static_cast<double>(batch.size());
  CKV_RETURN_IF_ERROR(status);
  CKV_RETURN_IF_ERROR(finished);

  size_t next = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    results[i].permute_seconds = permute_seconds;
    for (size_t head = 0; head < batch[i].heads.size(); ++head, ++next) {
      results[i].heads.push_back({.count = counts[next],
                                  .iterations = counts[problems.size() + next],
                                  .sizes = problems[next].sizes,
                                  .centroids = problems[next].centroids,
                                  .value_means = problems[next].value_means});
    }
  }
  return results;
}

void ClusterScheduler::Publish(gpu::PublishArgs args, std::function<void(absl::Status)> done) {
  queue_.Post([this, args = std::move(args), done = std::move(done)]() mutable {
    absl::Status status = device_.cluster_ops().Publish(*stream_, std::move(args));
    const absl::Status finished = stream_->Synchronize();
    done(status.ok() ? finished : status);
  });
}

}  // namespace clusterkv::service
