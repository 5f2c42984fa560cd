// The points of an assignment as a warp's lanes hold them, and the running maximum of their scores.
// The layout is that of mma.sync and of a warp's quarter of wgmma: lane l has parts of rows l / 4
// and l / 4 + 8 of each block of 16 rows.
#pragma once

#include <cmath>

#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_centroid.cuh"
#include "gpu/cuda/kernels/kmeans_element.cuh"

namespace clusterkv::gpu::cuda::kmeans {

// The keys of 16 * kRowBlocks rows of a warp, as A of kDim / 16 steps: see kmeans_centroid.cuh for
// the order of dimensions. Rows beyond the problem repeat its last.
template <int kDim, int kRowBlocks>
struct Keys {
  uint32_t a[kRowBlocks][kDim / 16][4];

  __device__ void Load(const Problem& problem, uint32_t first) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
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

  // 1 / |key - mean| of the two rows of a block, to all four lanes that share them; 0 for a key
  // without a direction. `first` as for Load; `mean` may be null. All lanes of a warp call.
  template <typename T>
  __device__ void InverseNorms(const Problem& problem, uint32_t first, int block, const float* mean,
                               float (&inverse)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float squared = 0.0f;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {  // pairs: step i / 2, half of it i % 2
        float2 pair = PairToFloat<T>(a[block][i / 2][i % 2 * 2 + half]);
        if (mean != nullptr) {
          const int dim = i / 4 * 32 + static_cast<int>(threadIdx.x % 4) * 8 + i % 4 * 2;
          const float2 centre = *reinterpret_cast<const float2*>(mean + dim);
          pair = {pair.x - centre.x, pair.y - centre.y};
        }
        squared += pair.x * pair.x;
        squared += pair.y * pair.y;
      }
      squared = SumOverQuad(squared);
      inverse[half] = rsqrtf(squared);
      if (__all_sync(0xFFFFFFFFu, InRange(squared))) continue;
      const uint32_t row = first + block * 16 + half * 8 + threadIdx.x % 32 / 4;
      const double exact = ExactSquare<T>(Row(problem, row), mean);
      if (!InRange(squared)) inverse[half] = InverseRoot(exact);
    }
  }

 private:
  template <typename S>
  static __device__ S SumOverQuad(S value) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
    return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
  }
  // Where fp32 overflows or underflows. It is rare: from memory, to leave registers alone.
  template <typename T>
  static __device__ double ExactSquare(const unsigned char* row, const float* mean) {
    double squared = 0.0;
#pragma unroll 1
    for (uint32_t dim = threadIdx.x % 4 * 8; dim < kDim; dim += 32) {
      float x[kVector];
      VectorToFloat<T>(LoadOnce(row + dim * 2), x);
      for (int e = 0; e < kVector; ++e) {
        const double centred = mean == nullptr ? x[e] : x[e] - mean[dim + e];
        squared += centred * centred;
      }
    }
    return SumOverQuad(squared);
  }
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

// The labels before an assignment of the rows that a lane writes: a quarter of the lanes do.
template <int kRowBlocks>
struct Labels {
  uint32_t label[kRowBlocks][2];

  __device__ void Load(const Batch& batch, const Problem& problem, uint32_t first,
                       bool first_time) {
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
      const uint32_t row = first + i * 8 + threadIdx.x % 32 / 4;
      const bool reads = !first_time && threadIdx.x % 4 == 0 && row < problem.tokens;
      label[i / 2][i % 2] = reads ? batch.labels[problem.first_token + row] : kMaxTokens;
    }
  }
};

// Writes labels and scores of the rows of a warp, `first` on, and the first time the inverse norms:
// whether a label is new.
template <typename T, int kDim, int kRowBlocks>
__device__ bool Store(const Batch& batch, uint32_t problem_index, const Problem& problem,
                      uint32_t first, bool first_time, const Keys<kDim, kRowBlocks>& keys,
                      const Labels<kRowBlocks>& before, Best<kRowBlocks>& best) {
  const uint32_t lane = threadIdx.x % 32;
  bool changed = false;
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
    float inverse[2];
    if (first_time) {
      keys.template InverseNorms<T>(problem, first, block, MeanOf<kDim>(batch, problem_index),
                                    inverse);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best.Combine(block, half);
      const uint32_t row = first + block * 16 + half * 8 + lane / 4;
      if (lane % 4 != 0 || row >= problem.tokens) continue;
      const uint64_t token = problem.first_token + row;
      const uint32_t label = best.label[block][half];
      const bool moved = label != before.label[block][half];
      if (moved) batch.labels[token] = static_cast<uint16_t>(label);
      batch.moved[token] = moved ? 1 : 0;
      batch.scores[token] = best.score[block][half];
      if (first_time) batch.inverse_norms[token] = inverse[half];
      changed = changed || moved;
    }
  }
  return changed;
}

}  // namespace clusterkv::gpu::cuda::kmeans
