// Before the first assignment: the mean key, if keys are centred, and the seeds' centroids.
//
// A group of lanes holds one row, 16 bytes a lane. Cost: the keys are read once for the mean. It is
// that of the finite keys: fp32 sums of a tile, then double over tiles, both in order.
#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_centroid.cuh"
#include "gpu/cuda/kernels/kmeans_element.cuh"
#include "gpu/kmeans_seed.h"

namespace clusterkv::gpu::cuda::kmeans {
namespace {

constexpr int kThreads = 256;

// How a block of kThreads holds rows of kDim elements.
template <int kDim>
struct RowGroups {
  static constexpr int kVectors = kDim / kVector;
  static constexpr int kLanes = kVectors <= 8 ? 8 : kVectors <= 16 ? 16 : 32;
  static constexpr int kRows = kThreads / kLanes;

  int lane = static_cast<int>(threadIdx.x) % kLanes;
  int row = static_cast<int>(threadIdx.x) / kLanes;
  bool holds = lane < kVectors;  // 12 of 16 lanes do for 96 dimensions
};

// All lanes of all warps call, `inside` or not.
template <typename T, int kDim>
__device__ void LoadKey(const RowGroups<kDim>& group, const Problem& problem, uint32_t token,
                        bool inside, float (&x)[kVector]) {
  if (!inside || !group.holds) {
    for (float& element : x) element = 0.0f;
    return;
  }
  const T* row = reinterpret_cast<const T*>(problem.rows) + size_t{token} * (2 * kDim);
  VectorToFloat<T>(LoadOnce(row + group.lane * kVector), x);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    TileSumKernel(const __grid_constant__ Batch batch, uint32_t first_tile) {
  using Groups = RowGroups<kDim>;
  __shared__ float sums[Groups::kRows][kDim];
  __shared__ uint32_t counts[Groups::kRows];
  const uint32_t tile = first_tile + blockIdx.x;
  const Problem problem = batch.problems[batch.tile_problem[tile]];
  const uint32_t first = (tile - problem.first_tile) * TilePoints(kDim);
  const Groups group;
  float sum[kVector] = {};
  uint32_t count = 0;
  for (uint32_t i = group.row; i < TilePoints(kDim); i += Groups::kRows) {
    const bool inside = first + i < problem.tokens;
    float x[kVector];
    LoadKey<T, kDim>(group, problem, first + i, inside, x);
    bool finite = true;
    for (const float element : x) finite = finite && isfinite(element);
    const uint32_t odd = __ballot_sync(0xFFFFFFFFu, !finite);
    const uint32_t lanes = Groups::kLanes == 32
                               ? odd
                               : odd >> (threadIdx.x % 32 / Groups::kLanes * Groups::kLanes) &
                                     ((1u << (Groups::kLanes % 32)) - 1);
    if (!inside || lanes != 0) continue;  // one NaN would take every key's direction
    for (int e = 0; e < kVector; ++e) sum[e] += x[e];
    ++count;
  }
  if (group.holds) {
    for (int e = 0; e < kVector; ++e) sums[group.row][group.lane * kVector + e] = sum[e];
  }
  if (group.lane == 0) counts[group.row] = count;
  __syncthreads();
  for (int i = threadIdx.x; i < kDim; i += kThreads) {
    float total = 0.0f;
    for (int row = 0; row < Groups::kRows; ++row) total += sums[row][i];
    batch.tile_sums[size_t{tile} * kDim + i] = total;
  }
  if (threadIdx.x == 0) {
    uint32_t total = 0;
    for (const uint32_t part : counts) total += part;
    batch.tile_counts[tile] = total;
  }
}

// One block a problem, one thread a dimension.
__global__ void MeanKernel(const __grid_constant__ Batch batch) {
  const Problem problem = batch.problems[blockIdx.x];
  double sum = 0.0;
  uint32_t count = 0;
  for (uint32_t i = 0; i < problem.tiles; ++i) {
    const size_t tile = problem.first_tile + i;
    sum += double{batch.tile_sums[tile * blockDim.x + threadIdx.x]};
    count += batch.tile_counts[tile];
  }
  batch.means[size_t{blockIdx.x} * blockDim.x + threadIdx.x] =
      static_cast<float>(sum / static_cast<double>(count == 0 ? 1 : count));
}

// One block a cluster. A token without a direction seeds none if one of the next in its range has
// one.
template <typename T, int kDim>
__global__ void __launch_bounds__(kClusterThreads) SeedKernel(const __grid_constant__ Batch batch) {
  const uint32_t problem_index = batch.cluster_problem[blockIdx.x];
  const Problem problem = batch.problems[problem_index];
  const uint32_t cluster = blockIdx.x - problem.first_cluster;
  const SeedRange range = RangeOfSeed(problem.seed, cluster, problem.clusters, problem.tokens);
  for (uint32_t i = 0; i < min(range.size, kSeedAttempts); ++i) {
    const uint32_t token = range.begin + (range.start + i) % range.size;
    if (SetCentroidToKey<T, kDim, kClusterThreads>(batch, problem_index, problem, cluster, token)) {
      return;
    }
  }
}

double KeyBytes(const Batch& batch) {
  return static_cast<double>(batch.tokens) * batch.head_dim * 2.0;
}

}  // namespace

cudaError_t FindMeans(const Batch& batch, cudaStream_t stream) {
  if (batch.means == nullptr) return cudaSuccess;
  return ForShape(batch, [&]<typename T, int kDim>() {
    const cudaError_t error = InRanges(
        batch.tiles, KeyBytes(batch), kBytesPerLaunch, [&](uint32_t first, uint32_t count) {
          TileSumKernel<T, kDim><<<count, kThreads, 0, stream>>>(batch, first);
        });
    if (error != cudaSuccess) return error;
    MeanKernel<<<batch.problem_count, kDim, 0, stream>>>(batch);
    return cudaGetLastError();
  });
}

cudaError_t Seed(const Batch& batch, cudaStream_t stream) {
  return ForShape(batch, [&]<typename T, int kDim>() {
    SeedKernel<T, kDim><<<batch.clusters, kClusterThreads, 0, stream>>>(batch);
    return cudaGetLastError();
  });
}

}  // namespace clusterkv::gpu::cuda::kmeans
