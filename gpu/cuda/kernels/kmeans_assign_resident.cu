// Assignment on Hopper, for problems whose centroids fit in a block's shared memory.
//
//   shared      all unit centroids of a problem, B of wgmma; copied once per block and problem
//   registers   keys of 64 points a warpgroup, A; those of the next 64 are on their way
//   registers   scores of 64 centroids (32 and 16 at the end), of each key the best so far
//
// A block takes a run of tiles, four warpgroups each their quarter of every tile. Between copies
// they wait for nobody: while some take maxima, others keep the tensor cores busy. The position of
// a score among a lane's 16 of a tile takes the place of its last 4 bits, so that the maximum
// carries it along: two instructions a score instead of three; scores within 2^-19 of each other
// count as equal. Otherwise as kmeans_assign.cu, which assigns all other problems.
//
// Measured on an H100 and no faster: maxima of one tile taken while the same warpgroup multiplies
// the next (three warpgroups then, for the registers).
//
// Cost: the keys are read once; centroids once a block. 2 * points * centroids * head_dim
// operations at the rate of wgmma with A in registers.
#include <algorithm>

#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_mma.cuh"
#include "gpu/cuda/kernels/kmeans_points.cuh"
#include "gpu/cuda/kernels/kmeans_wgmma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CLUSTERKV_HAS_WGMMA 1
#else
#define CLUSTERKV_HAS_WGMMA 0
#endif

namespace clusterkv::gpu::cuda::kmeans {
namespace {

constexpr int kThreads = 512;  // four warpgroups
constexpr uint32_t kTilesPerBlock = 32;

#if CLUSTERKV_HAS_WGMMA

// Centroids, padding included, and their biases into shared memory.
template <int kDim>
__device__ void CopyCentroids(const Batch& batch, const Problem& problem, unsigned char* matrices,
                              float* biases) {
  const uint32_t padded = ResidentCentroids(problem.clusters);
  const auto* from =
      static_cast<const unsigned char*>(batch.unit_centroids) + problem.first_centroid * kDim * 2;
  const uint32_t to = SharedAddress(matrices);
  for (uint32_t i = threadIdx.x * 16; i < padded * kDim * 2; i += kThreads * 16) {
    CopyAsync16(to + i, from + i);
  }
  const uint32_t to_biases = SharedAddress(biases);
  for (uint32_t i = threadIdx.x * 4; i < padded; i += kThreads * 4) {
    CopyAsync16(to_biases + i * 4, batch.biases + problem.first_centroid + i);
  }
  CommitCopies();
}

// The centroid of the best score is base + what the low bits say.
struct Leader {
  float score = -INFINITY;
  uint32_t base = UINT32_MAX;  // none yet

  __device__ void Offer(float value, uint32_t tile) {
    const bool better = value > score;
    score = better ? value : score;
    base = better ? tile : base;
  }
  // 0 if no score was above -inf: none is then.
  __device__ uint32_t Centroid() const {
    const uint32_t position = 15 - (__float_as_uint(score) & 15);
    return base == UINT32_MAX ? 0 : base + position / 2 * 8 + threadIdx.x % 4 * 2 + position % 2;
  }
};

// `mask` is ~15 in a register: an instruction takes one constant, which is the position.
template <int kPosition>
__device__ float Tagged(float score, uint32_t mask) {
  uint32_t tagged;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
      : "=r"(tagged)
      : "r"(__float_as_uint(score)), "r"(mask), "n"(15 - kPosition));
  return __uint_as_float(tagged);
}

template <int kPosition, int kCount>
__device__ void TakeMaxima(const float (&scores)[kCount], uint32_t mask, float& low, float& high) {
  constexpr int kAt = kPosition / 2 * 4 + kPosition % 2;
  const float a = Tagged<kPosition>(scores[kAt], mask);
  const float b = Tagged<kPosition>(scores[kAt + 2], mask);
  low = kPosition == 0 ? a : fmaxf(low, a);
  high = kPosition == 0 ? b : fmaxf(high, b);
  if constexpr (kPosition + 1 < kCount / 2) {
    TakeMaxima<kPosition + 1>(scores, mask, low, high);
  }
}

// kCentroids centroids from `first` on, all of a warpgroup.
template <typename T, int kDim, int kCentroids>
__device__ void Score(const Keys<kDim, 1>& keys, uint32_t matrices, const float* biases,
                      uint32_t first, uint32_t mask, Leader (&leaders)[2]) {
  float scores[kCentroids / 2];
#pragma unroll
  for (int n = 0; n < kCentroids / 8; ++n) {
    const float2 bias =
        *reinterpret_cast<const float2*>(biases + first + n * 8 + threadIdx.x % 4 * 2);
    scores[4 * n] = scores[4 * n + 2] = bias.x;
    scores[4 * n + 1] = scores[4 * n + 3] = bias.y;
  }
  const uint64_t descriptor = MatrixDescriptor(matrices + first * (2 * kDim), 16 * kDim);
  Pin(scores);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    Wgmma<T>(scores, keys.a[0][step], descriptor + step * 16, 1);  // two matrices further
  }
  WgmmaCommit();
  WgmmaWait<0>();
  Pin(scores);
  float low;
  float high;
  TakeMaxima<0>(scores, mask, low, high);
  leaders[0].Offer(low, first);
  leaders[1].Offer(high, first);
}

template <typename T, int kDim>
__device__ Best<1> BestOf(const Keys<kDim, 1>& keys, uint32_t matrices, const float* biases,
                          uint32_t clusters, uint32_t mask) {
  Leader leaders[2];
  const uint32_t padded = (clusters + 15) / 16 * 16;
  uint32_t first = 0;
  for (; first + 64 <= padded; first += 64) {
    Score<T, kDim, 64>(keys, matrices, biases, first, mask, leaders);
  }
  if (padded - first >= 32) {
    Score<T, kDim, 32>(keys, matrices, biases, first, mask, leaders);
    first += 32;
  }
  if (first < padded) Score<T, kDim, 16>(keys, matrices, biases, first, mask, leaders);
  Best<1> best;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    best.score[0][half] = leaders[half].score;
    best.label[0][half] = leaders[half].Centroid();
  }
  return best;
}

// The tiles of one problem in a block's run.
template <typename T, int kDim>
__device__ void AssignTiles(const Batch& batch, uint32_t problem_index, uint32_t first_tile,
                            uint32_t end_tile, bool first_time, unsigned char* shared) {
  const Problem problem = batch.problems[problem_index];
  float* biases =
      reinterpret_cast<float*>(shared + ResidentCentroids(problem.clusters) * (2 * kDim));
  __syncthreads();  // nobody reads the last problem's centroids any more
  CopyCentroids<kDim>(batch, problem, shared, biases);
  const uint32_t warp_row = threadIdx.x / 32 * 16;
  uint32_t row = (first_tile - problem.first_tile) * TilePoints(kDim) + warp_row;
  Keys<kDim, 1> keys;
  keys.Load(problem, row);
  uint32_t mask;
  asm volatile("mov.b32 %0, 0xFFFFFFF0;" : "=r"(mask));
  WaitForCopies<0>();
  FenceForWgmma();
  __syncthreads();
  bool changed = false;
  for (uint32_t tile = first_tile; tile < end_tile; ++tile, row += TilePoints(kDim)) {
    Keys<kDim, 1> next;
    next.Load(problem, tile + 1 < end_tile ? row + TilePoints(kDim) : row);
    Best<1> best = BestOf<T, kDim>(keys, SharedAddress(shared), biases, problem.clusters, mask);
    Labels<1> before;
    before.Load(batch, problem, row, first_time);
    changed |= Store<T>(batch, problem_index, problem, row, first_time, keys, before, best);
    keys = next;
  }
  if (__any_sync(0xFFFFFFFFu, changed) && threadIdx.x % 32 == 0) {
    batch.states[problem_index].changed = 1;
  }
}

#endif  // CLUSTERKV_HAS_WGMMA

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    AssignResidentKernel(const __grid_constant__ Batch batch, uint32_t first_tile,
                         uint32_t end_tile, uint32_t tiles_per_block, bool first_time) {
#if CLUSTERKV_HAS_WGMMA
  extern __shared__ __align__(128) unsigned char shared[];
  uint32_t tile = first_tile + blockIdx.x * tiles_per_block;
  const uint32_t end = min(end_tile, tile + tiles_per_block);
  while (tile < end) {
    const uint32_t problem_index = batch.tile_problem[tile];
    const Problem& problem = batch.problems[problem_index];
    const uint32_t problem_end = min(end, problem.first_tile + problem.tiles);
    if (batch.states[problem_index].done == 0 && IsResident(problem.clusters, kDim)) {
      AssignTiles<T, kDim>(batch, problem_index, tile, problem_end, first_time, shared);
    }
    tile = problem_end;
  }
#endif
}

template <typename T, int kDim>
cudaError_t Launch(const Batch& batch, bool first, cudaStream_t stream) {
  const uint32_t centroids = ResidentCentroids(batch.most_resident_clusters);
  const size_t bytes = size_t{centroids} * ResidentCentroidBytes(kDim);
  const cudaError_t error =
      cudaFuncSetAttribute(AssignResidentKernel<T, kDim>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  return InRanges(
      batch.tiles, batch.score_flop, kFlopPerResidentLaunch, [&](uint32_t begin, uint32_t count) {
        // Few blocks, to copy centroids seldom, but whole rounds of one a
        // multiprocessor.
        const uint32_t rounds = std::max(1u, count / (batch.multiprocessors * kTilesPerBlock));
        const uint32_t blocks = batch.multiprocessors * rounds;
        const uint32_t per_block = (count + blocks - 1) / blocks;
        AssignResidentKernel<T, kDim>
            <<<(count + per_block - 1) / per_block, kThreads, bytes, stream>>>(
                batch, begin, begin + count, per_block, first);
      });
}

}  // namespace

cudaError_t AssignResident(const Batch& batch, bool first, cudaStream_t stream) {
  return ForShape(batch, [&]<typename T, int kDim>() {
    if constexpr (kDim <= 128) {
      return Launch<T, kDim>(batch, first, stream);
    } else {
      return cudaErrorInvalidValue;  // its keys leave too few registers: nothing IsResident
    }
  });
}

}  // namespace clusterkv::gpu::cuda::kmeans
