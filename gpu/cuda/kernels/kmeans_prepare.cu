// Before the first assignment: the mean key (if keys are centred), 1 / |key - mean| of every key,
// and the seeds' centroids.
//
// A group of lanes holds one row, 16 bytes a lane. Cost: the keys are read once, twice if centred.
// The mean is that of the finite keys: fp32 sums of a tile, then double over tiles, both in order.
#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_centroid.cuh"
#include "gpu/cuda/kernels/kmeans_element.cuh"
#include "gpu/cuda/kernels/kmeans_seed.h"

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

// Over the lanes of each row.
template <int kLanes, typename S>
__device__ S SumOverLanes(S value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    NormKernel(const __grid_constant__ Batch batch, uint32_t first_tile) {
  using Groups = RowGroups<kDim>;
  const uint32_t tile = first_tile + blockIdx.x;
  const uint32_t problem_index = batch.tile_problem[tile];
  const Problem problem = batch.problems[problem_index];
  const uint32_t first = (tile - problem.first_tile) * TilePoints(kDim);
  const Groups group;
  float mean[kVector] = {};
  if (batch.means != nullptr && group.holds) {
    const float* means = batch.means + size_t{problem_index} * kDim + group.lane * kVector;
    for (int e = 0; e < kVector; ++e) mean[e] = means[e];
  }
#pragma unroll 4
  for (uint32_t i = group.row; i < TilePoints(kDim); i += Groups::kRows) {
    const bool inside = first + i < problem.tokens;
    float x[kVector];
    LoadKey<T, kDim>(group, problem, first + i, inside, x);
    float squared = 0.0f;
    for (int e = 0; e < kVector; ++e) {
      x[e] -= mean[e];
      squared += x[e] * x[e];
    }
    squared = SumOverLanes<Groups::kLanes>(squared);
    float inverse = rsqrtf(squared);
    if (__any_sync(0xFFFFFFFFu, !InRange(squared))) {
      double exact = 0.0;
      for (const float element : x) exact += double{element} * element;
      exact = SumOverLanes<Groups::kLanes>(exact);
      if (!InRange(squared)) inverse = InverseRoot(exact);
    }
    if (inside && group.lane == 0) batch.inverse_norms[problem.first_token + first + i] = inverse;
  }
}

// One block a cluster. A token without a direction seeds none if one of the 31 after it, within
// its range, has one.
template <typename T, int kDim>
__global__ void __launch_bounds__(kClusterThreads) SeedKernel(const __grid_constant__ Batch batch) {
  __shared__ float key[kDim];
  const uint32_t problem_index = batch.cluster_problem[blockIdx.x];
  const Problem problem = batch.problems[problem_index];
  const uint32_t cluster = blockIdx.x - problem.first_cluster;
  const SeedRange range = RangeOfSeed(problem.seed, cluster, problem.clusters, problem.tokens);
  const uint32_t candidate = range.begin + (range.start + threadIdx.x % 32) % range.size;
  const bool has_direction = batch.inverse_norms[problem.first_token + candidate] != 0.0f;
  const uint32_t directed = __ballot_sync(0xFFFFFFFFu, has_direction);  // equal in all warps
  const uint32_t steps = directed == 0 ? 0 : __ffs(static_cast<int>(directed)) - 1;
  const uint32_t token = range.begin + (range.start + steps) % range.size;
  LoadUnitKey<T, kDim>(batch, problem_index, problem, token, key);
  __syncthreads();
  SetCentroid<T, kDim>(batch, problem_index, problem.first_centroid + cluster, key);
}

double KeyBytes(const Batch& batch) {
  return static_cast<double>(batch.tokens) * batch.head_dim * 2.0;
}

}  // namespace

cudaError_t Prepare(const Batch& batch, cudaStream_t stream) {
  return ForShape(batch, [&]<typename T, int kDim>() {
    if (batch.means != nullptr) {
      const cudaError_t error = InRanges(
          batch.tiles, KeyBytes(batch), kBytesPerLaunch, [&](uint32_t first, uint32_t count) {
            TileSumKernel<T, kDim><<<count, kThreads, 0, stream>>>(batch, first);
          });
      if (error != cudaSuccess) return error;
      MeanKernel<<<batch.problem_count, kDim, 0, stream>>>(batch);
    }
    return InRanges(batch.tiles, KeyBytes(batch), kBytesPerLaunch,
                    [&](uint32_t first, uint32_t count) {
                      NormKernel<T, kDim><<<count, kThreads, 0, stream>>>(batch, first);
                    });
  });
}

cudaError_t Seed(const Batch& batch, cudaStream_t stream) {
  return ForShape(batch, [&]<typename T, int kDim>() {
    SeedKernel<T, kDim><<<batch.clusters, kClusterThreads, 0, stream>>>(batch);
    return cudaGetLastError();
  });
}

}  // namespace clusterkv::gpu::cuda::kmeans
