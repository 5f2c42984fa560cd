// kmeans and permute-offload: the daemon's side, by the operations that it calls.
#include <algorithm>
#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"
#include "client/bench/bench_run.h"
#include "client/bench/cores.h"
#include "client/bench/key_model.h"
#include "client/bench/pinned_region.h"
#include "gpu/cluster_ops.h"
#include "gpu/dtype.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr uint32_t kIterations = 10;
constexpr uint32_t kMaxRepeats = 20;       // each takes milliseconds
constexpr uint32_t kDistinctProblems = 8;  // the rest are copies of these, with seeds of their own
constexpr uint32_t kPermuteTokens = 8192;

size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

std::vector<KmeansSize> SizesFor(const BenchRun& run) {
  if (!run.options.kmeans.empty()) return run.options.kmeans;
  if (run.is_cuda()) return {{256, 8192, 102}, {256, 32'768, 400}, {8, 32'768, 400}};
  const uint32_t tokens = std::min(8192u, *std::ranges::max_element(run.options.contexts));
  return {{run.options.shape.kv_heads, tokens, tokens / 32}};
}

// Rows of `problems` runs in device memory.
absl::StatusOr<std::unique_ptr<gpu::DeviceMemory>> MakeRows(const BenchRun& run, gpu::Shape shape,
                                                            uint32_t problems, uint32_t tokens) {
  const uint32_t distinct = std::min(problems, kDistinctProblems);
  shape.kv_heads = distinct;
  shape.q_heads = distinct;
  const size_t run_bytes = tokens * shape.row_bytes();
  gpu::Device& device = run.backend.device();
  gpu::Stream& stream = run.backend.stream();
  CKV_ASSIGN_OR_RETURN(auto rows, device.Allocate(problems * run_bytes));
  CKV_ASSIGN_OR_RETURN(const auto staged, device.AllocatePinned(distinct * run_bytes));
  const KeyModel model(shape, tokens, run.options.seed);
  gpu::host::ThreadPool threads(UsableCores());
  threads.ParallelFor(distinct, [&](size_t p) {
    model.WriteRows(static_cast<uint32_t>(p), 0, tokens, staged->data() + p * run_bytes);
  });
  for (uint32_t p = 0; p < problems; ++p) {
    CKV_RETURN_IF_ERROR(stream.CopyAsync(rows->data() + p * run_bytes,
                                         staged->data() + p % distinct * run_bytes, run_bytes));
  }
  CKV_RETURN_IF_ERROR(stream.Synchronize());
  return rows;
}

absl::Status MeasureKmeansOf(const BenchRun& run, const KmeansSize& size, gpu::DType dtype) {
  gpu::Shape shape = run.options.shape;
  shape.dtype = dtype;
  gpu::Device& device = run.backend.device();
  CKV_ASSIGN_OR_RETURN(const auto rows, MakeRows(run, shape, size.problems, size.tokens));
  gpu::ClusterArgs args;
  args.head_dim = shape.head_dim;
  args.dtype = dtype;
  args.iterations = kIterations;
  args.largest_cluster_tokens = 4 * std::max(1u, size.tokens / size.clusters);
  args.center_keys = run.options.method.center_keys;
  const size_t most = size.clusters + size.tokens / args.largest_cluster_tokens;
  const size_t mean_bytes = Aligned(most * shape.head_dim * gpu::SizeOf(dtype));
  const size_t order_bytes = Aligned(size.tokens * sizeof(uint32_t));
  const size_t sizes_bytes = Aligned((most + 1) * sizeof(uint32_t));
  const size_t problem_bytes = 2 * mean_bytes + order_bytes + sizes_bytes;
  CKV_ASSIGN_OR_RETURN(const auto results, device.Allocate(size.problems * problem_bytes));
  for (uint32_t p = 0; p < size.problems; ++p) {
    std::byte* const own = results->data() + p * problem_bytes;
    auto* const sizes = reinterpret_cast<uint32_t*>(own + 2 * mean_bytes + order_bytes);
    args.problems.push_back({.rows = rows->data() + p * size.tokens * shape.row_bytes(),
                             .tokens = size.tokens,
                             .clusters = size.clusters,
                             .seed = run.options.seed + p,
                             .order = reinterpret_cast<uint32_t*>(own + 2 * mean_bytes),
                             .sizes = sizes,
                             .centroids = own,
                             .value_means = own + mean_bytes,
                             .count = sizes + most});
  }
  Timing timing;
  timing.work = [&](gpu::Stream& stream) { return device.cluster_ops().Cluster(stream, args); };
  timing.repeats = std::min(run.options.repeats, kMaxRepeats);
  timing.capture = false;  // it takes memory from the stream's pool
  CKV_ASSIGN_OR_RETURN(std::vector<double> samples, run.backend.Time(timing));
  // In every pass each key against each centroid; the keys read once a pass, then K and V once more
  // for the means, and the order written. A problem that settles early does less: not counted.
  const double points = static_cast<double>(size.problems) * size.tokens;
  const double key_bytes = static_cast<double>(shape.row_bytes()) / 2;
  const Work work = {.device_bytes = points * (key_bytes * (kIterations + 2) + 4.0),
                     .flops = 2.0 * points * size.clusters * shape.head_dim * kIterations};
  const double flops_per_second = work.flops / Summarize(samples).median * 1e6;
  run.AddRow("kmeans",
             {{"problems", size.problems},
              {"tokens", size.tokens},
              {"clusters", size.clusters},
              {"iterations", kIterations},
              {"head_dim", shape.head_dim},
              {"dtype", gpu::DTypeName(dtype)},
              {"center_keys", args.center_keys}},
             std::move(samples), work, {{"flops_per_second", flops_per_second}});
  return absl::OkStatus();
}

}  // namespace

absl::Status MeasureKmeans(const BenchRun& run) {
  if (!run.options.Has("kmeans")) return absl::OkStatus();
  for (const KmeansSize& size : SizesFor(run)) {
    if (!run.is_cuda()) CKV_RETURN_IF_ERROR(MeasureKmeansOf(run, size, gpu::DType::kFp32));
    CKV_RETURN_IF_ERROR(MeasureKmeansOf(run, size, run.options.shape.dtype));
  }
  run.AddNote(
      absl::StrCat("kmeans: ", kDistinctProblems,
                   " distinct runs of keys, copied to the other problems, each with a seed of "
                   "its own; work counts every pass, so early ends make the ratio better"));
  return absl::OkStatus();
}

absl::Status MeasurePermute(const BenchRun& run) {
  if (!run.options.Has("permute-offload")) return absl::OkStatus();
  const gpu::Shape& shape = run.options.shape;
  gpu::Device& device = run.backend.device();
  gpu::Stream& stream = run.backend.stream();
  // All heads of a segment, as the daemon hands them over; on the host one layer's.
  const auto problems = static_cast<uint32_t>(run.is_cuda() ? shape.problems() : shape.kv_heads);
  const uint32_t tokens = std::min(kPermuteTokens, *std::ranges::max_element(run.options.contexts));
  const size_t run_bytes = tokens * shape.row_bytes();
  const size_t order_bytes = Aligned(tokens * sizeof(uint32_t));
  CKV_ASSIGN_OR_RETURN(const auto rows, MakeRows(run, shape, problems, tokens));
  CKV_ASSIGN_OR_RETURN(const auto workspace, device.Allocate(problems * run_bytes));
  CKV_ASSIGN_OR_RETURN(const auto orders, device.Allocate(problems * order_bytes));
  gpu::host::ThreadPool threads(UsableCores());
  CKV_ASSIGN_OR_RETURN(const auto store,
                       PinnedRegion::Create(device, threads, problems * (run_bytes + order_bytes)));
  gpu::PermuteArgs args;
  args.row_bytes = shape.row_bytes();
  std::mt19937_64 random(run.options.seed);
  std::vector<uint32_t> order(tokens);
  for (uint32_t i = 0; i < tokens; ++i) order[i] = i;
  for (uint32_t p = 0; p < problems; ++p) {
    std::shuffle(order.begin(), order.end(), random);
    std::byte* const own = orders->data() + p * order_bytes;
    CKV_RETURN_IF_ERROR(stream.CopyAsync(own, order.data(), tokens * sizeof(uint32_t)));
    CKV_RETURN_IF_ERROR(stream.Synchronize());
    std::byte* const destination = store->data() + p * (run_bytes + order_bytes);
    args.problems.push_back({.rows = rows->data() + p * run_bytes,
                             .destination = destination,
                             .workspace = workspace->data() + p * run_bytes,
                             .order = reinterpret_cast<const uint32_t*>(own),
                             .tokens = tokens,
                             .positions = reinterpret_cast<uint32_t*>(destination + run_bytes)});
  }
  Timing timing;
  timing.work = [&](gpu::Stream& on) { return device.cluster_ops().Permute(on, args); };
  timing.repeats = std::min(run.options.repeats, kMaxRepeats);
  timing.capture = false;
  CKV_ASSIGN_OR_RETURN(std::vector<double> samples, run.backend.Time(timing));
  // Rows read, written in their new order and read again; rows and 4-byte positions to the host.
  const double bytes = static_cast<double>(problems) * static_cast<double>(run_bytes);
  const double positions = 4.0 * problems * tokens;
  run.AddRow("permute-offload",
             {{"problems", problems},
              {"tokens", tokens},
              {"head_dim", shape.head_dim},
              {"dtype", gpu::DTypeName(shape.dtype)}},
             std::move(samples),
             {.device_bytes = 3.0 * bytes + positions, .to_host_bytes = bytes + positions});
  return absl::OkStatus();
}

}  // namespace clusterkv::client::bench
