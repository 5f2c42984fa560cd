// Scores of centroids, q·mu * scale, by the tensor cores.
#pragma once

#include "gpu/cluster_worth.h"
#include "gpu/cuda/kernels/attend_tile.cuh"

namespace clusterkv::gpu::cuda {

// emit(g, cluster, score in units of log2) for clusters [begin, end) and all 16 rows of `queries`;
// scale: the method's, times log2 e. By kThreads threads; a warp takes eight centroids at a time.
// Reads each centroid once, 64 bytes of a row together. A dot product does not mind the order of
// its elements: each lane takes eight neighbours, where the product's own layout has pairs.
template <typename Storage, int kHeadDim, uint32_t kThreads, typename Emit>
__device__ void ScoreCentroids(const std::byte* centroids, uint32_t begin, uint32_t end,
                               const TileRows<kHeadDim>& queries, float scale, const Emit& emit) {
  constexpr uint32_t kParts = kHeadDim / 32;
  constexpr uint32_t kUnroll = kHeadDim <= 128 ? 2 : 1;  // eights in flight
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t row = lane / 4, quarter = lane % 4;
  for (uint32_t first = begin + threadIdx.x / 32 * 8 * kUnroll; first < end;
       first += kThreads / 32 * 8 * kUnroll) {
    uint4 raw[kUnroll][kParts];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      const uint32_t cluster = first + 8 * u + row;
      const auto* const from =
          reinterpret_cast<const uint4*>(centroids + size_t{cluster} * kHeadDim * 2) + quarter;
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
        raw[u][part] = cluster < end ? __ldg(from + 4 * part) : make_uint4(0, 0, 0, 0);
      }
    }
    float dots[kUnroll][4] = {};
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      const uint4 low = queries[row][Swizzled<kHeadDim>(row, 4 * part + quarter)];
      const uint4 high = queries[row + 8][Swizzled<kHeadDim>(row + 8, 4 * part + quarter)];
      const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
      for (uint32_t u = 0; u < kUnroll; ++u) {
        Storage::Mma(dots[u], a[0], raw[u][part].x, raw[u][part].y);
        Storage::Mma(dots[u], a[1], raw[u][part].z, raw[u][part].w);
      }
    }
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t cluster = first + 8 * u + 2 * quarter + i % 2;
        if (cluster < end) emit(row + i / 2 * 8, cluster, dots[u][i] * scale);
      }
    }
  }
}

// One cluster's score for its KV head: the group rule over `scores`, [group] with `stride` between
// them, in units of log2. largest, inverse_sum: of each query head's scores and their powers of
// two.
__device__ inline float CombineScores(GroupRule rule, const float* scores, uint32_t stride,
                                      uint32_t group, const float* largest,
                                      const float* inverse_sum) {
  float combined = rule == GroupRule::kMax ? scores[0] : 0.0f;
  for (uint32_t g = 0; g < group; ++g) {
    const float own = scores[size_t{g} * stride];
    if (rule == GroupRule::kSoftmax) {
      combined += exp2f(own - largest[g]) * inverse_sum[g];
    } else if (rule == GroupRule::kMax) {
      combined = fmaxf(combined, own);
    } else {
      combined += own / static_cast<float>(group);
    }
  }
  return combined;
}

// The running mean with one more of CombineScores; logits count in natural logarithms.
__device__ inline float NextMeanCombined(GroupRule rule, float mean, float combined) {
  return NextMeanScore(mean, rule == GroupRule::kSoftmax ? combined : combined * (1.0f / kLog2E));
}

}  // namespace clusterkv::gpu::cuda
