// Assignment: every key to the centroid of greatest inner product, the lowest of equals.
//
//   registers   keys of the tile, A of mma, loaded once             [256 or 128][head_dim]
//   shared      unit centroids, B, three stages by cp.async         [64 or 32][head_dim]
//   registers   scores of 16 centroids, and of each key the best so far
//
// Scores start from the centroid's bias: -mean.centroid, and -inf for padding, which so never
// wins. Cost per key and centroid: head_dim multiply-adds on the tensor cores, and three
// instructions for the running maximum, which hide behind them. The norm of a key changes no
// maximum; the first assignment finds it for the sums, since it has the keys at hand.
#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_mma.cuh"
#include "gpu/cuda/kernels/kmeans_points.cuh"

namespace clusterkv::gpu::cuda::kmeans {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 3;

template <int kDim>
struct Tile {
  static constexpr int kRowBlocks = static_cast<int>(TilePoints(kDim)) / (16 * kWarps);  // a warp
  static constexpr int kCentroids = kDim <= 128 ? 64 : 32;
  static constexpr int kMatrixBytes = kCentroids * kDim * 2;
  static constexpr int kStageBytes = kMatrixBytes + kCentroids * 4;  // with biases
};

// Centroids [first, first + kCentroids) into a stage: a plain copy, padding included.
template <int kDim>
__device__ void CopyCentroids(const Batch& batch, uint64_t first, uint32_t stage) {
  const auto* matrices = static_cast<const unsigned char*>(batch.unit_centroids) + first * kDim * 2;
#pragma unroll
  for (int i = 0; i < Tile<kDim>::kMatrixBytes / 16 / kThreads; ++i) {
    const uint32_t offset = (i * kThreads + threadIdx.x) * 16;
    CopyAsync16(stage + offset, matrices + offset);
  }
  if (threadIdx.x < Tile<kDim>::kCentroids / 4) {
    CopyAsync16(stage + Tile<kDim>::kMatrixBytes + threadIdx.x * 16,
                batch.biases + first + threadIdx.x * 4);
  }
}

// The scores of 16 centroids, `centroid` on, whose matrices and biases lie at the addresses.
template <typename T, int kDim>
__device__ void Score(const Keys<kDim, Tile<kDim>::kRowBlocks>& keys, const unsigned char* matrices,
                      const float* biases, uint32_t centroid, Best<Tile<kDim>::kRowBlocks>& best) {
  constexpr int kRowBlocks = Tile<kDim>::kRowBlocks;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t address = SharedAddress(matrices) + lane * 16;
  float scores[kRowBlocks][2][4];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2 bias = *reinterpret_cast<const float2*>(biases + n * 8 + lane % 4 * 2);
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
      scores[block][n][0] = scores[block][n][2] = bias.x;
      scores[block][n][1] = scores[block][n][3] = bias.y;
    }
  }
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    uint32_t b[2][4];
    LoadMatrices(address + i * 512, b[0]);
    LoadMatrices(address + 16 * kDim + i * 512, b[1]);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          MultiplyAdd<T>(scores[block][n], keys.a[block][2 * i + step], b[n][2 * step],
                         b[n][2 * step + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        best.Offer(block, i / 2, scores[block][n][i], centroid + n * 8 + i % 2);
      }
    }
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    AssignKernel(const __grid_constant__ Batch batch, uint32_t first_tile, bool first_time) {
  using TileOf = Tile<kDim>;
  extern __shared__ __align__(128) unsigned char stages[];
  const uint32_t tile = first_tile + blockIdx.x;
  const uint32_t problem_index = batch.tile_problem[tile];
  if (batch.states[problem_index].done != 0) return;
  const Problem problem = batch.problems[problem_index];
  if (batch.hopper && IsResident(problem.clusters, kDim)) return;
  const uint32_t warp_first =
      (tile - problem.first_tile) * TilePoints(kDim) + threadIdx.x / 32 * (16 * TileOf::kRowBlocks);
  const uint32_t centroid_tiles = (problem.clusters + TileOf::kCentroids - 1) / TileOf::kCentroids;
  const uint32_t stages_address = SharedAddress(stages);
  const auto copy = [&](uint32_t index) {
    if (index < centroid_tiles) {
      CopyCentroids<kDim>(batch, problem.first_centroid + index * TileOf::kCentroids,
                          stages_address + index % kStages * TileOf::kStageBytes);
    }
    CommitCopies();
  };
  for (int i = 0; i < kStages - 1; ++i) copy(i);
  Keys<kDim, TileOf::kRowBlocks> keys;
  keys.Load(problem, warp_first);
  Best<TileOf::kRowBlocks> best;
  for (uint32_t i = 0; i < centroid_tiles; ++i) {
    WaitForCopies<kStages - 2>();
    __syncthreads();  // the tile is there for all, and the stage before it free
    copy(i + kStages - 1);
    const unsigned char* stage = stages + i % kStages * TileOf::kStageBytes;
    const float* biases = reinterpret_cast<const float*>(stage + TileOf::kMatrixBytes);
    const uint32_t first = i * TileOf::kCentroids;
    const uint32_t count = min(problem.clusters - first, uint32_t{TileOf::kCentroids});
    for (uint32_t n = 0; n < count; n += 16) {
      Score<T, kDim>(keys, stage + n * (2 * kDim), biases + n, first + n + threadIdx.x % 4 * 2,
                     best);
    }
  }
  Labels<TileOf::kRowBlocks> before;
  before.Load(batch, problem, warp_first, first_time);
  const bool changed =
      Store<T>(batch, problem_index, problem, warp_first, first_time, keys, before, best);
  if (__syncthreads_or(changed) != 0 && threadIdx.x == 0) batch.states[problem_index].changed = 1;
}

}  // namespace

cudaError_t Assign(const Batch& batch, bool first, cudaStream_t stream) {
  if (batch.hopper && batch.most_resident_clusters > 0) {
    const cudaError_t error = AssignResident(batch, first, stream);
    if (error != cudaSuccess || batch.all_resident) return error;
  }
  return ForShape(batch, [&]<typename T, int kDim>() {
    constexpr int kBytes = kStages * Tile<kDim>::kStageBytes;
    const cudaError_t error = cudaFuncSetAttribute(
        AssignKernel<T, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    return InRanges(
        batch.tiles, batch.score_flop, kFlopPerLaunch, [&](uint32_t first_tile, uint32_t count) {
          AssignKernel<T, kDim><<<count, kThreads, kBytes, stream>>>(batch, first_tile, first);
        });
  });
}

}  // namespace clusterkv::gpu::cuda::kmeans
