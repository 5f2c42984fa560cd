// Integers that order as scores do, so that sorting knows no NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace clusterkv::gpu::host {

// Rises with the score; NaN is below all.
inline uint32_t OrderedBits(float score) {
  if (std::isnan(score)) return 0;
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 ties with 0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace clusterkv::gpu::host
