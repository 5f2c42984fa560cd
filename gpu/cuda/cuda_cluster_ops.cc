#include "gpu/cuda/cuda_cluster_ops.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gpu/cluster_checks.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/cuda/cuda_memory.h"
#include "gpu/cuda/cuda_stream.h"
#include "gpu/cuda/kernels/cluster_kernels.h"
#include "gpu/cuda/kernels/kmeans.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::cuda {
namespace {

// Device memory that goes back to the stream's pool when the stream has passed.
class Temporary {
 public:
  static absl::StatusOr<Temporary> Upload(CudaStream& stream, const void* source, size_t bytes) {
    CKV_ASSIGN_OR_RETURN(std::byte* const data, stream.Upload(source, bytes));
    return Temporary(stream, data);
  }
  static absl::StatusOr<Temporary> Take(CudaStream& stream, size_t bytes) {
    CKV_ASSIGN_OR_RETURN(std::byte* const data, stream.TakeTemporary(bytes));
    return Temporary(stream, data);
  }
  Temporary(Temporary&& other) noexcept
      : stream_(other.stream_), data_(std::exchange(other.data_, nullptr)) {}
  ~Temporary() {
    if (data_ != nullptr) stream_.Discard(data_);
  }
  Temporary& operator=(Temporary&&) = delete;

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  Temporary(CudaStream& stream, std::byte* data) : stream_(stream), data_(data) {}

  CudaStream& stream_;
  std::byte* data_;
};

template <typename T>
absl::StatusOr<Temporary> UploadAll(CudaStream& stream, const std::vector<T>& values) {
  return Temporary::Upload(stream, values.data(), values.size() * sizeof(T));
}

}  // namespace

absl::Status CudaClusterOps::Initialize(Stream& stream, std::byte* state, const StateLayout& layout,
                                        uint32_t generation) {
  if (state == nullptr) return absl::InvalidArgumentError("the state is null");
  CKV_RETURN_IF_ERROR(CheckCudaDType(layout.dtype));
  CKV_ASSIGN_OR_RETURN(CudaStream* const native, NativeStream(stream));
  const ScopedDevice device(native->ordinal());
  return ToStatus(LaunchInitialize(state, layout, generation, native->native()),
                  "initialising a state");
}

absl::Status CudaClusterOps::Stage(Stream& stream, StageArgs args) {
  CKV_RETURN_IF_ERROR(CheckStage(args));
  CKV_RETURN_IF_ERROR(CheckCudaDType(args.dtype));
  CKV_RETURN_IF_ERROR(CheckReachable(args.range, "the ring range"));
  CKV_ASSIGN_OR_RETURN(CudaStream* const native, NativeStream(stream));
  const ScopedDevice device(native->ordinal());
  const size_t plane = size_t{args.range_tokens} * args.kv_heads * args.head_dim * 2;
  StageLaunch launch = {.range = args.range,
                        .layer_stride = args.layer_stride == 0 ? 2 * plane : args.layer_stride,
                        .range_tokens = args.range_tokens,
                        .first_token = args.first_token,
                        .count = args.count,
                        .layer_count = args.layer_count,
                        .kv_heads = args.kv_heads,
                        .head_dim = args.head_dim,
                        .destinations = nullptr,
                        .few = {}};
  if (args.destinations.size() <= StageLaunch::kFew) {
    std::ranges::copy(args.destinations, launch.few);
    return ToStatus(LaunchStage(launch, native->native()), "staging");
  }
  CKV_ASSIGN_OR_RETURN(const Temporary destinations, UploadAll(*native, args.destinations));
  launch.destinations = destinations.as<std::byte*>();
  return ToStatus(LaunchStage(launch, native->native()), "staging");
}

absl::Status CudaClusterOps::Cluster(Stream& stream, ClusterArgs args) {
  CKV_RETURN_IF_ERROR(CheckCluster(args));
  CKV_RETURN_IF_ERROR(CheckCudaDType(args.dtype));
  CKV_ASSIGN_OR_RETURN(CudaStream* const native, NativeStream(stream));
  const ScopedDevice device(native->ordinal());
  const size_t row_bytes = size_t{4} * args.head_dim;
  std::vector<KMeansProblem> problems;
  problems.reserve(args.problems.size());
  for (const ClusterProblem& problem : args.problems) {
    const std::byte* rows = problem.rows;
    if (problem.device_rows != nullptr) {
      CKV_RETURN_IF_ERROR(
          native->CopyAsync(problem.device_rows, problem.rows, problem.tokens * row_bytes));
      rows = problem.device_rows;
    }
    problems.push_back({.rows = rows,
                        .tokens = problem.tokens,
                        .clusters = problem.clusters,
                        .seed = problem.seed,
                        .order = problem.order,
                        .sizes = problem.sizes,
                        .centroids = problem.centroids,
                        .value_means = problem.value_means,
                        .count = problem.count,
                        .iterations = problem.iterations});
  }
  const KMeansArgs launch = {.bf16 = args.dtype == DType::kBf16,
                             .head_dim = args.head_dim,
                             .iterations = args.iterations,
                             .largest_cluster_tokens = args.largest_cluster_tokens,
                             .center_keys = args.center_keys,
                             .problems = problems.data(),
                             .problem_count = static_cast<uint32_t>(problems.size())};
  CKV_ASSIGN_OR_RETURN(const Temporary workspace,
                       Temporary::Take(*native, KMeansWorkspaceBytes(launch)));
  return ToStatus(LaunchKMeans(launch, workspace.as<void>(), native->native()), "k-means");
}

absl::Status CudaClusterOps::Permute(Stream& stream, PermuteArgs args) {
  CKV_RETURN_IF_ERROR(CheckPermute(args));
  CKV_ASSIGN_OR_RETURN(CudaStream* const native, NativeStream(stream));
  const ScopedDevice device(native->ordinal());
  std::vector<GatherProblem> problems;
  problems.reserve(args.problems.size());
  uint32_t most_tokens = 0;
  for (const PermuteProblem& problem : args.problems) {
    problems.push_back({.rows = problem.rows,
                        .target = problem.workspace,
                        .order = problem.order,
                        .positions = problem.positions,
                        .tokens = problem.tokens,
                        .first_position = problem.first_position});
    most_tokens = std::max(most_tokens, problem.tokens);
  }
  CKV_ASSIGN_OR_RETURN(const Temporary uploaded, UploadAll(*native, problems));
  CKV_RETURN_IF_CUDA_ERROR(
      LaunchGather(uploaded.as<GatherProblem>(), static_cast<uint32_t>(problems.size()),
                   most_tokens, static_cast<uint32_t>(args.row_bytes), native->fault(),
                   native->native()),
      "permuting");
  for (const PermuteProblem& problem : args.problems) {
    CKV_RETURN_IF_ERROR(
        native->CopyAsync(problem.destination, problem.workspace, problem.tokens * args.row_bytes));
  }
  return absl::OkStatus();
}

absl::Status CudaClusterOps::Publish(Stream& stream, PublishArgs args) {
  CKV_RETURN_IF_ERROR(CheckPublish(args));
  CKV_ASSIGN_OR_RETURN(CudaStream* const native, NativeStream(stream));
  const ScopedDevice device(native->ordinal());
  std::vector<PublishHead> heads;
  heads.reserve(args.problems.size());
  for (const PublishProblem& problem : args.problems) {
    heads.push_back({.sizes = problem.sizes,
                     .centroids = problem.centroids,
                     .value_means = problem.value_means,
                     .cluster_begin = problem.cluster_begin,
                     .cluster_count = problem.cluster_count,
                     .chunk = problem.chunk,
                     .rows_offset = problem.rows_offset,
                     .positions_offset = problem.positions_offset});
  }
  const uint32_t valid = 0;
  CKV_ASSIGN_OR_RETURN(const Temporary uploaded, UploadAll(*native, heads));
  CKV_ASSIGN_OR_RETURN(const Temporary invalid, Temporary::Upload(*native, &valid, sizeof(valid)));
  return ToStatus(LaunchPublish({.state = args.state,
                                 .block = *args.layout,
                                 .segment = args.segment,
                                 .segment_begin = args.segment_begin,
                                 .segment_end = args.segment_end,
                                 .heads = uploaded.as<PublishHead>(),
                                 .invalid = invalid.as<uint32_t>()},
                                native->fault(), native->native()),
                  "publishing");
}

}  // namespace clusterkv::gpu::cuda
