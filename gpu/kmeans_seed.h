// Which token seeds which cluster: one at random of each of k equal ranges of tokens. So seeds are
// distinct, independent of each other, and spread over the positions, near which keys resemble
// each other; and all backends start from the same ones. Plain C++ and CUDA.
#pragma once

#include <cstdint>

#include "gpu/host_device.h"

namespace clusterkv::gpu {

struct SeedRange {
  uint32_t begin;
  uint32_t size;   // at least 1
  uint32_t start;  // 0..size-1, drawn
};

// The mixing function of SplitMix64.
CLUSTERKV_HOST_DEVICE constexpr uint64_t MixBits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Of the tokens of a range that are tried, from the drawn one on, the first with a direction seeds.
constexpr uint32_t kSeedAttempts = 16;

// REQUIRES: cluster < clusters <= tokens.
CLUSTERKV_HOST_DEVICE constexpr SeedRange RangeOfSeed(uint64_t seed, uint32_t cluster,
                                                      uint32_t clusters, uint32_t tokens) {
  const auto begin = static_cast<uint32_t>(uint64_t{tokens} * cluster / clusters);
  const auto end = static_cast<uint32_t>(uint64_t{tokens} * (uint64_t{cluster} + 1) / clusters);
  const uint64_t draw = MixBits(seed + (uint64_t{cluster} + 1) * 0x9E3779B97F4A7C15u);
  return {begin, end - begin, static_cast<uint32_t>(draw % (end - begin))};
}

}  // namespace clusterkv::gpu
