// The hot loop of the k-means, compiled once per instruction set: included by kmeans.cc alone,
// through hwy/foreach_target.h.
//
// Points lie in tiles of kTileVectors * Lanes, transposed, so that one vector holds one dimension
// of several points; centroids lie in groups of kGroup, interleaved by dimension, and are
// broadcast:
//
//   points     [tile][dim][point of the tile]      16 KiB or less of L1 per tile of d = 128
//   centroids  [group][dim][centroid of the group]  streamed from L2, once per tile
//
// So a lane is a point: the argmax over the centroids needs no reduction across lanes, and the
// score matrix never leaves the registers.
#if defined(CLUSTERKV_GPU_HOST_KMEANS_KERNELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CLUSTERKV_GPU_HOST_KMEANS_KERNELS_INL_H_
#undef CLUSTERKV_GPU_HOST_KMEANS_KERNELS_INL_H_
#else
#define CLUSTERKV_GPU_HOST_KMEANS_KERNELS_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <limits>

#include "gpu/host/kmeans_tiles.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::gpu::host {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using IdTag = hn::RebindToUnsigned<FloatTag>;
using FloatVector = hn::Vec<FloatTag>;
using IdVector = hn::Vec<IdTag>;

// 12 accumulators hide the latency of FMA and fit the 16 registers of AVX2 with 3 + 1 operands.
constexpr size_t kTileVectors = 3;
static_assert(kCentroidGroup == 4, "AssignTile names its accumulators");

size_t PointsPerTile() { return kTileVectors * hn::Lanes(FloatTag()); }

// Strictly greater, so that of equal scores the lowest id stays.
HWY_INLINE void KeepBetter(FloatVector score, uint32_t id, FloatVector& best, IdVector& best_id) {
  const IdTag ids;
  const auto better = hn::Gt(score, best);
  best = hn::Max(score, best);
  best_id = hn::IfThenElse(hn::RebindMask(ids, better), hn::Set(ids, id), best_id);
}

// Scores of one tile with all centroids.
HWY_INLINE void AssignTile(const float* HWY_RESTRICT points, const float* HWY_RESTRICT centroids,
                           size_t groups, size_t dim, uint32_t* HWY_RESTRICT labels,
                           float* HWY_RESTRICT scores) {
  const FloatTag d;
  const IdTag ids;
  const size_t lanes = hn::Lanes(d);
  FloatVector best0 = hn::Set(d, -std::numeric_limits<float>::infinity());
  FloatVector best1 = best0, best2 = best0;
  IdVector id0 = hn::Zero(ids), id1 = id0, id2 = id0;
  for (size_t group = 0; group < groups; ++group) {
    FloatVector a0 = hn::Zero(d), a1 = a0, a2 = a0, b0 = a0, b1 = a0, b2 = a0;
    FloatVector c0 = a0, c1 = a0, c2 = a0, e0 = a0, e1 = a0, e2 = a0;
    const float* HWY_RESTRICT point = points;
    for (size_t i = 0; i < dim; ++i) {
      const FloatVector p0 = hn::Load(d, point);
      const FloatVector p1 = hn::Load(d, point + lanes);
      const FloatVector p2 = hn::Load(d, point + 2 * lanes);
      FloatVector c = hn::Set(d, centroids[0]);
      a0 = hn::MulAdd(c, p0, a0), a1 = hn::MulAdd(c, p1, a1), a2 = hn::MulAdd(c, p2, a2);
      c = hn::Set(d, centroids[1]);
      b0 = hn::MulAdd(c, p0, b0), b1 = hn::MulAdd(c, p1, b1), b2 = hn::MulAdd(c, p2, b2);
      c = hn::Set(d, centroids[2]);
      c0 = hn::MulAdd(c, p0, c0), c1 = hn::MulAdd(c, p1, c1), c2 = hn::MulAdd(c, p2, c2);
      c = hn::Set(d, centroids[3]);
      e0 = hn::MulAdd(c, p0, e0), e1 = hn::MulAdd(c, p1, e1), e2 = hn::MulAdd(c, p2, e2);
      point += kTileVectors * lanes;
      centroids += kCentroidGroup;
    }
    const uint32_t id = static_cast<uint32_t>(group * kCentroidGroup);
    KeepBetter(a0, id, best0, id0), KeepBetter(a1, id, best1, id1), KeepBetter(a2, id, best2, id2);
    KeepBetter(b0, id + 1, best0, id0), KeepBetter(b1, id + 1, best1, id1);
    KeepBetter(b2, id + 1, best2, id2), KeepBetter(c0, id + 2, best0, id0);
    KeepBetter(c1, id + 2, best1, id1), KeepBetter(c2, id + 2, best2, id2);
    KeepBetter(e0, id + 3, best0, id0), KeepBetter(e1, id + 3, best1, id1);
    KeepBetter(e2, id + 3, best2, id2);
  }
  hn::StoreU(id0, ids, labels), hn::StoreU(best0, d, scores);
  hn::StoreU(id1, ids, labels + lanes), hn::StoreU(best1, d, scores + lanes);
  hn::StoreU(id2, ids, labels + 2 * lanes), hn::StoreU(best2, d, scores + 2 * lanes);
}

void AssignTiles(const AssignTilesArgs& args) {
  const size_t width = PointsPerTile();
  for (size_t tile = args.first_tile; tile < args.end_tile; ++tile) {
    AssignTile(args.points + tile * width * args.dim, args.centroids, args.centroid_groups,
               args.dim, args.labels + tile * width, args.scores + tile * width);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace clusterkv::gpu::host
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
