// The points of an assignment as a warp's lanes hold them, and the running maximum of their scores.
// The layout is that of mma.sync and of a warp's quarter of wgmma: lane l has parts of rows l / 4
// and l / 4 + 8 of each block of 16 rows.
#pragma once

#include <cmath>

#include "gpu/cuda/kernels/kmeans_batch.cuh"
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

// Writes labels and cosines of the rows of a warp, `first` on: whether a label is new.
template <int kRowBlocks>
__device__ bool Store(const Batch& batch, const Problem& problem, uint32_t first, bool first_time,
                      Best<kRowBlocks>& best) {
  const uint32_t lane = threadIdx.x % 32;
  bool changed = false;
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
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

}  // namespace clusterkv::gpu::cuda::kmeans
