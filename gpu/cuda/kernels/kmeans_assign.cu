// Assignment: every key to the centroid of greatest inner product, the lowest of equals.
//
//   registers   keys of the tile, A of mma, loaded once             [256 or 128][head_dim]
//   shared      unit centroids, B, three stages by cp.async         [64 or 32][head_dim]
//   registers   scores of 16 centroids, and of each key the best so far
//
// Scores start from the centroid's bias: -mean.centroid, and -inf for padding, which so never
// wins. Cost per key and centroid: head_dim multiply-adds on the tensor cores, and three
// instructions for the running maximum, which hide behind them. The norm of a key changes no
// maximum; it is only for the stored cosine, by which empty clusters are reseeded.
#include <cmath>

#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_element.cuh"
#include "gpu/cuda/kernels/kmeans_mma.cuh"

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

// The keys of 16 * kRowBlocks rows of a warp, as A of kDim / 16 steps: see kmeans_centroid.cuh for
// the order of dimensions. Rows beyond the problem repeat its last.
template <int kDim>
struct Keys {
  uint32_t a[Tile<kDim>::kRowBlocks][kDim / 16][4];

  __device__ void Load(const Problem& problem, uint32_t first) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < Tile<kDim>::kRowBlocks; ++block) {
      const uint32_t low = first + block * 16 + lane / 4;
      const unsigned char* low_row = Row(problem, low) + lane % 4 * 16;
      const unsigned char* high_row = Row(problem, low + 8) + lane % 4 * 16;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        const uint4 x = LoadOnce(low_row + i * 64);
        const uint4 y = LoadOnce(high_row + i * 64);
        Set(a[block][2 * i], x.x, y.x, x.y, y.y);
        Set(a[block][2 * i + 1], x.z, y.z, x.w, y.w);
      }
    }
  }

 private:
  static __device__ const unsigned char* Row(const Problem& problem, uint32_t token) {
    return problem.rows + size_t{min(token, problem.tokens - 1)} * (4 * kDim);
  }
  static __device__ void Set(uint32_t (&to)[4], uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    to[0] = x;
    to[1] = y;
    to[2] = z;
    to[3] = w;
  }
};

// The best centroid so far of the rows whose scores a lane sees: rows lane / 4 and 8 more of each
// block of 16. Never one beyond the last: NaN and -inf win over nothing.
template <int kRowBlocks>
struct Best {
  float score[kRowBlocks][2];
  uint32_t label[kRowBlocks][2];

  __device__ Best() {
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
      score[i / 2][i % 2] = -INFINITY;
      label[i / 2][i % 2] = 0;
    }
  }
  __device__ void Offer(int block, int half, float value, uint32_t centroid) {
    const bool better = value > score[block][half];
    score[block][half] = better ? value : score[block][half];
    label[block][half] = better ? centroid : label[block][half];
  }
  // Over the four lanes that share rows.
  __device__ void Combine(int block, int half) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, score[block][half], offset);
      const uint32_t centroid = __shfl_xor_sync(0xFFFFFFFFu, label[block][half], offset);
      const bool better = other > score[block][half] ||
                          (other == score[block][half] && centroid < label[block][half]);
      if (better) score[block][half] = other;
      if (better) label[block][half] = centroid;
    }
  }
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
__device__ void Score(const Keys<kDim>& keys, const unsigned char* matrices, const float* biases,
                      uint32_t centroid, Best<Tile<kDim>::kRowBlocks>& best) {
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

// Whether a label of this warp's rows is new.
template <int kDim>
__device__ bool Store(const Batch& batch, const Problem& problem, uint32_t first, bool first_time,
                      Best<Tile<kDim>::kRowBlocks>& best) {
  const uint32_t lane = threadIdx.x % 32;
  bool changed = false;
#pragma unroll
  for (int block = 0; block < Tile<kDim>::kRowBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best.Combine(block, half);
      const uint32_t row = first + block * 16 + half * 8 + lane / 4;
      if (lane % 4 != 0 || row >= problem.tokens) continue;
      const uint64_t token = problem.first_token + row;
      const auto label = static_cast<uint16_t>(best.label[block][half]);
      if (!first_time && batch.labels[token] == label) {
        // Its centroid has moved nevertheless: the score is new.
      } else {
        batch.labels[token] = label;
        changed = true;
      }
      batch.scores[token] = best.score[block][half] * batch.inverse_norms[token];
    }
  }
  return changed;
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
  Keys<kDim> keys;
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
  const bool changed = Store<kDim>(batch, problem, warp_first, first_time, best);
  if (__syncthreads_or(changed) != 0 && threadIdx.x == 0) batch.states[problem_index].changed = 1;
}

}  // namespace

cudaError_t Assign(const Batch& batch, bool first, cudaStream_t stream) {
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
