// What the steps of k-means share: the problems of one call on the device, their working memory,
// and the function that enqueues each step.
//
// Problems differ in size, so no grid is [problem][element]: the tiles, clusters and pieces of all
// problems are numbered through, and three maps lead from such a number to its problem.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace clusterkv::gpu::cuda::kmeans {

// Token indices and labels are kept in 16 bits.
constexpr uint32_t kMaxTokens = 65536;
// Centroids are padded to this many, a whole number of tiles of the assignment.
constexpr uint32_t kCentroidPadding = 64;
// Threads that work on one cluster, or one piece of one.
constexpr int kClusterThreads = 128;
// Up to here the histograms of a grouping are in shared memory, beyond in the workspace.
constexpr uint32_t kSharedClusters = 1536;
constexpr uint32_t kGroupWarps = 32;  // at most: each has a histogram

// Points that one block assigns; their keys are in its registers.
__host__ __device__ constexpr uint32_t TilePoints(uint32_t head_dim) {
  return head_dim <= 128 ? 256 : 128;
}

// Problems whose centroids fit in the shared memory of a Hopper block (227 KiB) are assigned by
// kmeans_assign_resident.cu there, all others, and all on other devices, by kmeans_assign.cu.
__host__ __device__ constexpr uint32_t ResidentCentroids(uint32_t clusters) {
  return (clusters + 15) / 16 * 16;
}
__host__ __device__ constexpr uint32_t ResidentCentroidBytes(uint32_t head_dim) {
  return head_dim * 2 + 4;  // with its bias
}
__host__ __device__ constexpr bool IsResident(uint32_t clusters, uint32_t head_dim) {
  return head_dim <= 128 &&
         ResidentCentroids(clusters) * ResidentCentroidBytes(head_dim) <= 226 * 1024;
}

struct Problem {
  const unsigned char* rows = nullptr;
  uint32_t* order = nullptr;
  uint32_t* sizes = nullptr;
  void* centroids = nullptr;
  void* value_means = nullptr;
  uint32_t* count = nullptr;
  uint32_t* iterations = nullptr;
  uint64_t seed = 0;
  uint64_t first_token = 0;      // into the arrays by token
  uint64_t first_centroid = 0;   // into unit centroids and biases, which are padded
  uint64_t first_histogram = 0;  // into the histograms; only if clusters > kSharedClusters
  uint32_t tokens = 0;
  uint32_t clusters = 0;
  uint32_t first_tile = 0;
  uint32_t tiles = 0;
  uint32_t first_cluster = 0;
  uint32_t first_piece = 0;
  uint32_t pieces = 0;  // most that splitting can make
};

struct State {
  uint32_t changed;  // a label, by the last assignment
  uint32_t done;
  uint32_t grouping;    // 0 or 1: where the last one is
  uint32_t iterations;  // done
};

// By value to every kernel. Arrays are in the workspace.
struct Batch {
  Problem* problems = nullptr;
  State* states = nullptr;
  uint32_t* tile_problem = nullptr;     // [tiles]
  uint32_t* cluster_problem = nullptr;  // [clusters]
  uint32_t* piece_problem = nullptr;    // [pieces]
  float* inverse_norms = nullptr;       // [tokens] 0: a key without a direction
  float* scores = nullptr;              // [tokens] product with the assigned centroid
  uint16_t* labels = nullptr;           // [tokens]
  uint8_t* moved = nullptr;             // [tokens] 1: the last assignment changed the label
  uint16_t* members = nullptr;          // [2][tokens] by label, ascending within one
  uint32_t* begins = nullptr;           // [2][clusters + problems] into the problem's members
  uint32_t* piece_begins = nullptr;     // [pieces] likewise
  void* unit_centroids = nullptr;       // [padded centroids]; layout: kmeans_centroid.cuh
  float* sums = nullptr;                // [clusters][head_dim] of unit keys
  float* biases = nullptr;              // [padded centroids] -mean.centroid; padding: -inf
  uint16_t* histograms = nullptr;       // [kGroupWarps][clusters] of each large problem
  float* means = nullptr;               // [problems][head_dim]; null: keys are not centred
  float* tile_sums = nullptr;           // [tiles][head_dim] if centred
  uint32_t* tile_counts = nullptr;      // [tiles] if centred

  uint64_t tokens = 0;
  uint64_t padded_centroids = 0;
  uint64_t histogram_entries = 0;
  double score_flop = 0.0;  // of one assignment
  uint32_t problem_count = 0;
  uint32_t tiles = 0;
  uint32_t clusters = 0;
  uint32_t pieces = 0;
  uint32_t most_tokens = 0;             // of a problem
  uint32_t most_shared_clusters = 0;    // of a problem with up to kSharedClusters
  uint32_t most_resident_clusters = 0;  // of a problem that IsResident; 0: none
  bool all_resident = true;
  bool hopper = false;  // and so has wgmma
  uint32_t multiprocessors = 1;
  uint32_t head_dim = 0;
  uint32_t largest = 0;
  bool bf16 = false;
};

// A grouping of a problem: 0 and 1 take turns, so that the one before is there as well.
struct Grouping {
  uint16_t* members;  // [tokens]
  uint32_t* begins;   // [clusters + 1]
};

__device__ inline Grouping GroupingOf(const Batch& batch, uint32_t problem_index,
                                      const Problem& problem, uint32_t which) {
  const uint64_t stride = uint64_t{batch.clusters} + batch.problem_count;
  return {batch.members + which * batch.tokens + problem.first_token,
          batch.begins + which * stride + problem.first_cluster + problem_index};
}

// Large grids are cut in launches of about a millisecond at most on an H100, so that decode steps
// get their turn: bytes of rows, and multiply-adds counted as two.
constexpr double kBytesPerLaunch = 2.5e9;
constexpr double kFlopPerLaunch = 0.3e12;
constexpr double kFlopPerResidentLaunch = 0.45e12;

// Calls launch(first, count) for near-equal ranges over [0, count).
template <typename Launch>
cudaError_t InRanges(uint32_t count, double work, double work_per_launch, Launch&& launch) {
  const uint64_t ranges = 1 + static_cast<uint64_t>(work / work_per_launch);
  for (uint64_t i = 0; i < ranges; ++i) {
    const auto begin = static_cast<uint32_t>(count * i / ranges);
    const auto end = static_cast<uint32_t>(count * (i + 1) / ranges);
    if (begin == end) continue;
    launch(begin, end - begin);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T, typename Launch>
cudaError_t ForHeadDim(const Batch& batch, Launch&& launch) {
  switch (batch.head_dim) {
    case 64:
      return launch.template operator()<T, 64>();
    case 96:
      return launch.template operator()<T, 96>();
    case 128:
      return launch.template operator()<T, 128>();
    case 256:
      return launch.template operator()<T, 256>();
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls launch.operator()<Element, head_dim>(): all that a kernel is compiled for.
template <typename Launch>
cudaError_t ForShape(const Batch& batch, Launch&& launch) {
  return batch.bf16 ? ForHeadDim<__nv_bfloat16>(batch, launch) : ForHeadDim<__half>(batch, launch);
}

// The steps, in the order of their files.
cudaError_t FindMeans(const Batch& batch, cudaStream_t stream);  // if keys are centred
cudaError_t Seed(const Batch& batch, cudaStream_t stream);       // first centroids
cudaError_t Assign(const Batch& batch, bool first, cudaStream_t stream);
cudaError_t AssignResident(const Batch& batch, bool first, cudaStream_t stream);
cudaError_t Group(const Batch& batch, bool first, cudaStream_t stream);
cudaError_t Update(const Batch& batch, cudaStream_t stream);  // after the first grouping
cudaError_t Move(const Batch& batch, cudaStream_t stream);    // after each later one
cudaError_t Finish(const Batch& batch, cudaStream_t stream);  // all results

}  // namespace clusterkv::gpu::cuda::kmeans
