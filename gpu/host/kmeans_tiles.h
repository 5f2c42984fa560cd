// What the k-means hands to its vector kernel; kmeans_kernels-inl.h draws the layouts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clusterkv::gpu::host {

// Centroids that are scored together.
inline constexpr size_t kCentroidGroup = 4;

struct AssignTilesArgs {
  const float* points = nullptr;     // [tiles][dim][points per tile], aligned for vectors
  const float* centroids = nullptr;  // [centroid_groups][dim][kCentroidGroup]
  size_t centroid_groups = 0;
  size_t dim = 0;
  size_t first_tile = 0;
  size_t end_tile = 0;
  uint32_t* labels = nullptr;  // [tiles][points per tile]; of equal scores the lowest
  float* scores = nullptr;     // [tiles][points per tile]; of the label's centroid
};

}  // namespace clusterkv::gpu::host
