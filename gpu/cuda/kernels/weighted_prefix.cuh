// The shortest prefix, in falling (key, then rising id), whose weights reach a goal: the clusters
// of the highest score that fill a budget, or the least recently used that free enough room.
//
// A radix search over the keys' four bytes finds the key at which the goal is reached; then the
// items above it are collected in any order, and ties at it in the order of their ids. One block
// does it: 4 passes over the items, about 6 barriers each; no sort of more than what was chosen.
#pragma once

#include <cstdint>

namespace clusterkv::gpu::cuda {

// (key, id) as one number: rising ids fall.
__device__ inline uint64_t ChosenItem(uint32_t key, uint32_t id) {
  return uint64_t{key} << 32 | (0xffffffffu - id);
}
__device__ inline uint32_t ItemId(uint64_t item) {
  return 0xffffffffu - static_cast<uint32_t>(item);
}

struct PrefixShared {
  uint32_t histogram[256];
  uint32_t digit, left, count, ties, first_tie;
  bool all;
};

// keys, weights: [n]; key 0 or weight 0: not an item. chosen: room for every item that could be.
// Returns how many were chosen, in no order. All threads of the block call it.
__device__ inline uint32_t ChoosePrefix(const uint32_t* keys, const uint32_t* weights, uint32_t n,
                                        uint32_t goal, uint64_t* chosen, PrefixShared& shared) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t prefix = 0, mask = 0;
  if (threadIdx.x == 0) {
    shared.left = goal;
    shared.all = false;
    shared.count = shared.ties = 0;
    shared.first_tie = 0xffffffffu;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) shared.histogram[i] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t key = keys[i];
      if (key != 0 && (key & mask) == prefix) {
        atomicAdd(&shared.histogram[key >> shift & 255], weights[i]);
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      // Lane l holds the 8 bins that fall from 255 - 8 l.
      const uint32_t top = 255 - 8 * lane;
      uint32_t own = 0;
      for (uint32_t b = 0; b < 8; ++b) own += shared.histogram[top - b];
      uint32_t sum = own;
      for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
      }
      const uint32_t left = shared.left;
      const uint32_t reached = __ballot_sync(0xffffffffu, sum >= left);
      __syncwarp();
      if (reached == 0) {
        if (lane == 0) shared.all = true;  // only in the first pass: later the goal is in the bin
      } else if (lane == static_cast<uint32_t>(__ffs(static_cast<int>(reached)) - 1)) {
        uint32_t before = sum - own;
        for (uint32_t b = 0; b < 8; ++b) {
          const uint32_t weight = shared.histogram[top - b];
          if (before + weight >= left) {
            shared.digit = top - b;
            break;
          }
          before += weight;
        }
        shared.left = left - before;
      }
    }
    __syncthreads();
    if (shared.all) break;
    prefix |= shared.digit << shift;
    mask |= 255u << shift;
  }
  const bool all = shared.all;
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t key = keys[i];
    if (key == 0 || weights[i] == 0) continue;
    if (all || key > prefix) {
      chosen[atomicAdd(&shared.count, 1u)] = ChosenItem(key, i);
    } else if (key == prefix) {
      atomicAdd(&shared.ties, 1u);
      atomicMin(&shared.first_tie, i);
    }
  }
  __syncthreads();
  if (all) return shared.count;
  if (shared.ties == 1) {
    if (threadIdx.x == 0) chosen[shared.count++] = ChosenItem(prefix, shared.first_tie);
  } else if (threadIdx.x < 32) {
    uint32_t left = shared.left;
    for (uint32_t begin = shared.first_tie / 32 * 32; begin < n && left > 0; begin += 32) {
      const uint32_t i = begin + lane;
      const bool tie = i < n && keys[i] == prefix && weights[i] != 0;
      const uint32_t weight = tie ? weights[i] : 0;
      uint32_t sum = weight;
      for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
      }
      const bool taken = tie && sum - weight < left;
      if (taken) chosen[atomicAdd(&shared.count, 1u)] = ChosenItem(prefix, i);
      const uint32_t total = __shfl_sync(0xffffffffu, sum, 31);
      left -= min(left, total);
    }
  }
  __syncthreads();
  return shared.count;
}

// Falling. `count` items in place, with room for the next power of two; all threads of the block
// call it. Up to kRanked items are ranked
// against each other, more take a bitonic network.
__device__ inline void SortFalling(uint64_t* items, uint32_t count) {
  constexpr uint32_t kRanked = 256;
  if (count <= kRanked && count <= blockDim.x) {
    uint64_t own = 0;
    uint32_t rank = 0;
    if (threadIdx.x < count) {
      own = items[threadIdx.x];
      for (uint32_t i = 0; i < count; ++i) rank += items[i] > own ? 1 : 0;
    }
    __syncthreads();
    if (threadIdx.x < count) items[rank] = own;
    __syncthreads();
    return;
  }
  uint32_t size = 1;
  while (size < count) size *= 2;
  for (uint32_t i = count + threadIdx.x; i < size; i += blockDim.x) items[i] = 0;
  __syncthreads();
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t step = run / 2; step > 0; step /= 2) {
      for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) {
        const uint32_t partner = i ^ step;
        if (partner <= i) continue;
        const uint64_t a = items[i];
        const uint64_t b = items[partner];
        if ((i & run) == 0 ? a < b : a > b) {
          items[i] = b;
          items[partner] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace clusterkv::gpu::cuda
