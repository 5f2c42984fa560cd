// The working memory of a call, its problems' way to the device, and the order of the steps.
//
// Problems travel as kernel parameters: a copy from pageable host memory may wait for the stream
// and is refused in a stream capture.
#include <algorithm>
#include <cmath>

#include "gpu/cuda/kernels/kmeans.h"
#include "gpu/cuda/kernels/kmeans_batch.cuh"

namespace clusterkv::gpu::cuda {
namespace kmeans {
namespace {

constexpr uint32_t kDescribedPerLaunch = 128;  // parameters hold 32,764 bytes
constexpr int kDescribeThreads = 256;

struct Descriptions {
  Problem problems[kDescribedPerLaunch];
  uint32_t first;
};

// One block a problem: its description, its part of the maps, and the padding of its centroids.
__global__ void __launch_bounds__(kDescribeThreads)
    DescribeKernel(const __grid_constant__ Descriptions descriptions,
                   const __grid_constant__ Batch batch) {
  const uint32_t index = descriptions.first + blockIdx.x;
  const Problem& problem = descriptions.problems[blockIdx.x];
  if (threadIdx.x == 0) {
    batch.problems[index] = problem;
    batch.states[index] = {};
  }
  for (uint32_t i = threadIdx.x; i < problem.tiles; i += kDescribeThreads) {
    batch.tile_problem[problem.first_tile + i] = index;
  }
  for (uint32_t i = threadIdx.x; i < problem.clusters; i += kDescribeThreads) {
    batch.cluster_problem[problem.first_cluster + i] = index;
  }
  for (uint32_t i = threadIdx.x; i < problem.pieces; i += kDescribeThreads) {
    batch.piece_problem[problem.first_piece + i] = index;
  }
  const uint32_t padded =
      (problem.clusters + kCentroidPadding - 1) / kCentroidPadding * kCentroidPadding;
  for (uint32_t i = threadIdx.x; i < padded; i += kDescribeThreads) {
    batch.biases[problem.first_centroid + i] = i < problem.clusters ? 0.0f : -INFINITY;
  }
  // Finite, for a bias of -inf to decide; a seed without a direction leaves its centroid zero.
  auto* words = reinterpret_cast<uint4*>(batch.unit_centroids);
  const uint32_t row_words = batch.head_dim / 8;
  const size_t begin = problem.first_centroid * row_words;
  for (size_t i = threadIdx.x; i < size_t{padded} * row_words; i += kDescribeThreads) {
    words[begin + i] = {0, 0, 0, 0};
  }
}

bool IsValid(const KMeansArgs& args) {
  const uint32_t d = args.head_dim;
  if (d != 64 && d != 96 && d != 128 && d != 256) return false;
  return std::all_of(args.problems, args.problems + args.problem_count, [](const auto& problem) {
    return problem.tokens >= 1 && problem.tokens <= kMaxTokens && problem.clusters >= 1;
  });
}

// Adds up problems in the order in which they lie in the arrays.
class Totals {
 public:
  Totals(const KMeansArgs& args, Batch& batch) : args_(args), batch_(batch) {}

  Problem Add(const KMeansProblem& from) {
    Problem p;
    p.rows = static_cast<const unsigned char*>(from.rows);
    p.order = from.order;
    p.sizes = from.sizes;
    p.centroids = from.centroids;
    p.value_means = from.value_means;
    p.count = from.count;
    p.iterations = from.iterations;
    p.seed = from.seed;
    p.tokens = from.tokens;
    p.clusters = std::min(from.clusters, from.tokens);
    const uint32_t points = TilePoints(args_.head_dim);
    p.tiles = (p.tokens + points - 1) / points;
    p.pieces = p.clusters + p.tokens / batch_.largest;
    p.first_token = batch_.tokens;
    p.first_centroid = batch_.padded_centroids;
    p.first_histogram = batch_.histogram_entries;
    p.first_tile = batch_.tiles;
    p.first_cluster = batch_.clusters;
    p.first_piece = batch_.pieces;
    batch_.tokens += p.tokens;
    batch_.padded_centroids +=
        (p.clusters + kCentroidPadding - 1) / kCentroidPadding * kCentroidPadding;
    batch_.tiles += p.tiles;
    batch_.clusters += p.clusters;
    batch_.pieces += p.pieces;
    batch_.most_tokens = std::max(batch_.most_tokens, p.tokens);
    batch_.score_flop += 2.0 * p.tokens * p.clusters * args_.head_dim;
    if (IsResident(p.clusters, args_.head_dim)) {
      batch_.most_resident_clusters = std::max(batch_.most_resident_clusters, p.clusters);
    } else {
      batch_.all_resident = false;
    }
    if (p.clusters > kSharedClusters) {
      batch_.histogram_entries += uint64_t{kGroupWarps} * ((p.clusters + 1) / 2 * 2);
    } else {
      batch_.most_shared_clusters = std::max(batch_.most_shared_clusters, p.clusters);
    }
    return p;
  }

 private:
  const KMeansArgs& args_;
  Batch& batch_;
};

Batch EmptyBatch(const KMeansArgs& args) {
  Batch batch;
  batch.problem_count = args.problem_count;
  batch.head_dim = args.head_dim;
  batch.largest = std::max<uint32_t>(1, args.largest_cluster_tokens);
  batch.bf16 = args.bf16;
  return batch;
}

Batch BatchOf(const KMeansArgs& args) {
  Batch batch = EmptyBatch(args);
  Totals totals(args, batch);
  for (uint32_t i = 0; i < args.problem_count; ++i) totals.Add(args.problems[i]);
  return batch;
}

// Gives the arrays their places from `base` on; returns the bytes they take.
size_t Place(const KMeansArgs& args, uintptr_t base, Batch& batch) {
  size_t bytes = 0;
  const auto place = [&]<typename T>(T*& array, size_t count, size_t element) {
    array = reinterpret_cast<T*>(base + bytes);
    bytes += (count * element + 255) / 256 * 256;
  };
  place(batch.problems, batch.problem_count, sizeof(Problem));
  place(batch.states, batch.problem_count, sizeof(State));
  place(batch.tile_problem, batch.tiles, sizeof(uint32_t));
  place(batch.cluster_problem, batch.clusters, sizeof(uint32_t));
  place(batch.piece_problem, batch.pieces, sizeof(uint32_t));
  place(batch.inverse_norms, batch.tokens, sizeof(float));
  place(batch.scores, batch.tokens, sizeof(float));
  place(batch.labels, batch.tokens, sizeof(uint16_t));
  place(batch.moved, batch.tokens, sizeof(uint8_t));
  place(batch.members, 2 * batch.tokens, sizeof(uint16_t));
  place(batch.begins, 2 * (size_t{batch.clusters} + batch.problem_count), sizeof(uint32_t));
  place(batch.sums, size_t{batch.clusters} * batch.head_dim, sizeof(float));
  place(batch.piece_begins, batch.pieces, sizeof(uint32_t));
  place(batch.unit_centroids, batch.padded_centroids * batch.head_dim, 2);
  place(batch.biases, batch.padded_centroids, sizeof(float));
  place(batch.histograms, batch.histogram_entries, sizeof(uint16_t));
  if (args.center_keys) {
    place(batch.means, size_t{batch.problem_count} * batch.head_dim, sizeof(float));
    place(batch.tile_sums, size_t{batch.tiles} * batch.head_dim, sizeof(float));
    place(batch.tile_counts, batch.tiles, sizeof(uint32_t));
  }
  return bytes;
}

cudaError_t Describe(const KMeansArgs& args, const Batch& batch, cudaStream_t stream) {
  Batch running = EmptyBatch(args);
  Totals totals(args, running);
  Descriptions descriptions;
  for (uint32_t first = 0; first < args.problem_count; first += kDescribedPerLaunch) {
    const uint32_t count = std::min(kDescribedPerLaunch, args.problem_count - first);
    descriptions.first = first;
    for (uint32_t i = 0; i < count; ++i) {
      descriptions.problems[i] = totals.Add(args.problems[first + i]);
    }
    DescribeKernel<<<count, kDescribeThreads, 0, stream>>>(descriptions, batch);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t ReadDevice(Batch& batch) {
  int device = 0;
  int major = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  batch.hopper = major == 9;
  batch.multiprocessors = static_cast<uint32_t>(std::max(1, multiprocessors));
  return error;
}

cudaError_t Run(const KMeansArgs& args, const Batch& batch, cudaStream_t stream) {
  cudaError_t error = Describe(args, batch, stream);
  if (error == cudaSuccess) error = FindMeans(batch, stream);
  if (error == cudaSuccess) error = Seed(batch, stream);
  const uint32_t iterations = std::max<uint32_t>(1, args.iterations);
  for (uint32_t i = 0; i < iterations && error == cudaSuccess; ++i) {
    error = Assign(batch, i == 0, stream);
    if (error == cudaSuccess) error = Group(batch, i == 0, stream);
    if (error == cudaSuccess && i + 1 < iterations) {
      error = i == 0 ? Update(batch, stream) : Move(batch, stream);
    }
  }
  return error == cudaSuccess ? Finish(batch, stream) : error;
}

}  // namespace
}  // namespace kmeans

size_t KMeansWorkspaceBytes(const KMeansArgs& args) {
  if (!kmeans::IsValid(args)) return 0;
  kmeans::Batch batch = kmeans::BatchOf(args);
  return kmeans::Place(args, 0, batch);
}

cudaError_t LaunchKMeans(const KMeansArgs& args, void* workspace, cudaStream_t stream) {
  if (!kmeans::IsValid(args)) return cudaErrorInvalidValue;
  if (args.problem_count == 0) return cudaSuccess;
  kmeans::Batch batch = kmeans::BatchOf(args);
  kmeans::Place(args, reinterpret_cast<uintptr_t>(workspace), batch);
  if (const cudaError_t error = kmeans::ReadDevice(batch); error != cudaSuccess) return error;
  return kmeans::Run(args, batch, stream);
}

}  // namespace clusterkv::gpu::cuda
