// Results of the last grouping: empty clusters dropped, large ones split in position order, and
// the means of raw keys and values.
//
// Cost: K and V are read once. A cluster of n tokens becomes ceil(n / largest) pieces that differ
// by one token at most; so there are at most clusters + tokens / largest.
#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_block.cuh"
#include "gpu/cuda/kernels/kmeans_rows.cuh"

namespace clusterkv::gpu::cuda::kmeans {
namespace {

constexpr int kSplitThreads = 1024;

// One block a problem.
__global__ void __launch_bounds__(kSplitThreads) SplitKernel(const __grid_constant__ Batch batch) {
  __shared__ uint32_t shared[32];
  const Problem problem = batch.problems[blockIdx.x];
  const auto [members, begins] =
      GroupingOf(batch, blockIdx.x, problem, batch.states[blockIdx.x].grouping);
  uint32_t* piece_begins = batch.piece_begins + problem.first_piece;
  uint32_t before = 0;
  for (uint32_t base = 0; base < problem.clusters; base += kSplitThreads) {
    const uint32_t cluster = base + threadIdx.x;
    uint32_t begin = 0;
    uint32_t size = 0;
    if (cluster < problem.clusters) {
      begin = begins[cluster];
      size = begins[cluster + 1] - begin;
    }
    const uint32_t pieces = size / batch.largest + (size % batch.largest == 0 ? 0 : 1);
    uint32_t total;
    const uint32_t first = before + BlockExclusiveSum(pieces, shared, total);
    for (uint32_t i = 0; i < pieces; ++i) {
      const auto from = static_cast<uint32_t>(uint64_t{size} * i / pieces);
      const auto to = static_cast<uint32_t>(uint64_t{size} * (i + 1) / pieces);
      problem.sizes[first + i] = to - from;
      piece_begins[first + i] = begin + from;
    }
    before += total;
  }
  if (threadIdx.x == 0) {
    *problem.count = before;
    if (problem.iterations != nullptr) {
      *problem.iterations = batch.states[blockIdx.x].iterations;
    }
  }
  for (uint32_t i = threadIdx.x; i < problem.tokens; i += kSplitThreads) {
    problem.order[i] = __ldg(members + i);
  }
}

// One block a piece that there may be.
template <typename T, int kDim>
__global__ void __launch_bounds__(kClusterThreads)
    MeansKernel(const __grid_constant__ Batch batch, uint32_t first_piece) {
  __shared__ float sum[2 * kDim];
  const uint32_t problem_index = batch.piece_problem[first_piece + blockIdx.x];
  const Problem problem = batch.problems[problem_index];
  const uint32_t piece = first_piece + blockIdx.x - problem.first_piece;
  if (piece >= *problem.count) return;
  const uint32_t size = problem.sizes[piece];
  const uint32_t begin = batch.piece_begins[problem.first_piece + piece];
  const uint16_t* members =
      GroupingOf(batch, problem_index, problem, batch.states[problem_index].grouping).members +
      begin;
  // Weights before the sum: it cannot overflow where the mean does not.
  const float weight = 1.0f / static_cast<float>(size);
  SumRows<T, 2 * kDim, kClusterThreads>(
      problem.rows, 4 * kDim, size, [members](uint32_t i) { return __ldg(members + i); },
      [weight](uint32_t, uint32_t) { return weight; }, nullptr, sum);
  for (int i = threadIdx.x; i < kDim; i += kClusterThreads) {
    const size_t element = size_t{piece} * kDim + i;
    static_cast<T*>(problem.centroids)[element] = FromFloat<T>(sum[i]);
    static_cast<T*>(problem.value_means)[element] = FromFloat<T>(sum[kDim + i]);
  }
}

}  // namespace

cudaError_t Finish(const Batch& batch, cudaStream_t stream) {
  SplitKernel<<<batch.problem_count, kSplitThreads, 0, stream>>>(batch);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  const double bytes = static_cast<double>(batch.tokens) * batch.head_dim * 4.0;
  return ForShape(batch, [&]<typename T, int kDim>() {
    return InRanges(batch.pieces, bytes, kBytesPerLaunch, [&](uint32_t first, uint32_t count) {
      MeansKernel<T, kDim><<<count, kClusterThreads, 0, stream>>>(batch, first);
    });
  });
}

}  // namespace clusterkv::gpu::cuda::kmeans
