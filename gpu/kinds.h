// The enumerations of shape and method. Depends on nothing, so that kernels see them, too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clusterkv::gpu {

// Storage types of K and V. Arithmetic is always fp32, whatever the storage.
enum class DType : uint32_t { kBf16 = 1, kFp16 = 2, kFp32 = 3 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kFp32 ? 4 : 2; }

// How the query heads that share a KV head agree on one list of clusters.
enum class GroupRule : uint32_t {
  kSoftmax = 1,  // per query head a softmax over the centroids, summed over the group
  kMean = 2,     // mean of the scaled scores
  kMax = 3,      // maximum of the scaled scores
};

}  // namespace clusterkv::gpu
