// The shortest prefix, in falling (key, then rising id), whose weights reach a goal: the clusters
// of the highest score that fill a budget, or the least recently used that free enough room.
//
// One block does it. A search over the keys' bits, two at a time, finds the key at which the goal
// is reached: each of the 16 rounds sums the weights at or above three candidates, over keys that
// threads hold in registers, without atomics and with one barrier. Then the items above that key
// are collected in any order, and ties at it in the order of their ids; no more is sorted than
// chosen.
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

// kThreads: of the block, at most 1,024.
template <uint32_t kThreads>
struct PrefixShared {
  uint32_t sums[2][3][kThreads / 32];  // of the warps; rounds take turns
  uint32_t count, ties, first_tie;
};

// With kPerThread items of each thread in registers; 0: keys and weights are read in every round.
template <uint32_t kThreads, uint32_t kPerThread>
__device__ uint32_t ChoosePrefixOf(const uint32_t* keys, const uint32_t* weights, uint32_t n,
                                   uint32_t goal, uint64_t* chosen,
                                   PrefixShared<kThreads>& shared) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t own_keys[kPerThread + 1], own_weights[kPerThread + 1];  // never without an element
  if constexpr (kPerThread > 0) {
#pragma unroll
    for (uint32_t j = 0; j < kPerThread; ++j) {
      const uint32_t i = j * kThreads + threadIdx.x;
      own_keys[j] = i < n ? keys[i] : 0;
      own_weights[j] = i < n ? weights[i] : 0;
    }
  }
  const auto for_each = [&](const auto& body) {  // body(id, key, weight)
    if constexpr (kPerThread > 0) {
#pragma unroll
      for (uint32_t j = 0; j < kPerThread; ++j) {
        body(j * kThreads + threadIdx.x, own_keys[j], own_weights[j]);
      }
    } else {
      for (uint32_t i = threadIdx.x; i < n; i += kThreads) body(i, keys[i], weights[i]);
    }
  };
  if (threadIdx.x == 0) {
    shared.count = shared.ties = 0;
    shared.first_tie = 0xffffffffu;
  }
  // The largest key that still reaches the goal, bits from above; 0 if all together do not.
  uint32_t threshold = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    uint32_t sums[3] = {0, 0, 0};
    for_each([&](uint32_t, uint32_t key, uint32_t weight) {
#pragma unroll
      for (uint32_t c = 0; c < 3; ++c) {
        if (key != 0 && key >= (threshold | (c + 1) << shift)) sums[c] += weight;
      }
    });
    auto& warp_sums = shared.sums[(shift / 2) % 2];
#pragma unroll
    for (uint32_t c = 0; c < 3; ++c) {
      const uint32_t sum = __reduce_add_sync(0xffffffffu, sums[c]);
      if (lane == 0) warp_sums[c][warp] = sum;
    }
    __syncthreads();
    // Every warp sums the warps' sums: one read each, instead of one for every warp.
    uint32_t totals[3];
#pragma unroll
    for (uint32_t c = 0; c < 3; ++c) {
      const uint32_t own = lane < kThreads / 32 ? warp_sums[c][lane] : 0;
      totals[c] = __reduce_add_sync(0xffffffffu, own);
    }
    uint32_t digit = 0;
    for (uint32_t c = 0; c < 3; ++c) {
      if (totals[c] >= goal) digit = c + 1;
    }
    threshold |= digit << shift;
  }
  uint32_t above = 0;  // weight of the larger keys
  if (threshold != 0) {
    for_each([&](uint32_t, uint32_t key, uint32_t weight) {
      if (key > threshold) above += weight;
    });
    above = __reduce_add_sync(0xffffffffu, above);
    __syncthreads();
    if (lane == 0) shared.sums[0][0][warp] = above;
    __syncthreads();
    above = __reduce_add_sync(0xffffffffu, lane < kThreads / 32 ? shared.sums[0][0][lane] : 0);
  }
  for_each([&](uint32_t i, uint32_t key, uint32_t weight) {
    if (key == 0 || weight == 0 || key < threshold) return;
    if (key > threshold) {
      chosen[atomicAdd(&shared.count, 1u)] = ChosenItem(key, i);
    } else {
      atomicAdd(&shared.ties, 1u);
      atomicMin(&shared.first_tie, i);
    }
  });
  __syncthreads();
  if (shared.ties == 1) {
    if (threadIdx.x == 0) chosen[shared.count++] = ChosenItem(threshold, shared.first_tie);
  } else if (shared.ties > 1 && threadIdx.x < 32) {
    uint32_t left = goal - min(goal, above);
    for (uint32_t begin = shared.first_tie / 32 * 32; begin < n && left > 0; begin += 32) {
      const uint32_t i = begin + lane;
      const bool tie = i < n && keys[i] == threshold && weights[i] != 0;
      const uint32_t weight = tie ? weights[i] : 0;
      uint32_t sum = weight;
      for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
      }
      const bool taken = tie && sum - weight < left;
      if (taken) chosen[atomicAdd(&shared.count, 1u)] = ChosenItem(threshold, i);
      left -= min(left, __shfl_sync(0xffffffffu, sum, 31));
    }
  }
  __syncthreads();
  return shared.count;
}

// keys, weights: [n]; key 0 or weight 0: not an item. chosen: room for every item that could be.
// Returns how many were chosen, in no order. All kThreads threads of the block call it.
template <uint32_t kThreads>
__device__ uint32_t ChoosePrefix(const uint32_t* keys, const uint32_t* weights, uint32_t n,
                                 uint32_t goal, uint64_t* chosen, PrefixShared<kThreads>& shared) {
  if (n <= kThreads) return ChoosePrefixOf<kThreads, 1>(keys, weights, n, goal, chosen, shared);
  if (n <= 4 * kThreads) return ChoosePrefixOf<kThreads, 4>(keys, weights, n, goal, chosen, shared);
  if (n <= 16 * kThreads) {
    return ChoosePrefixOf<kThreads, 16>(keys, weights, n, goal, chosen, shared);
  }
  return ChoosePrefixOf<kThreads, 0>(keys, weights, n, goal, chosen, shared);
}

// Falling. `count` items in place, with room for the next power of two; all threads of the block
// call it. Up to a block's worth of items are ranked against each other, more take a bitonic
// network.
template <uint32_t kThreads>
__device__ void SortFalling(uint64_t* items, uint32_t count) {
  constexpr uint32_t kRanked = 256;
  if (count <= kRanked && count <= kThreads) {
    uint64_t own = 0;
    uint32_t rank = 0;
    if (threadIdx.x < count) {
      own = items[threadIdx.x];
#pragma unroll 8
      for (uint32_t i = 0; i < count; ++i) rank += items[i] > own ? 1 : 0;
    }
    __syncthreads();
    if (threadIdx.x < count) items[rank] = own;
    __syncthreads();
    return;
  }
  uint32_t size = 1;
  while (size < count) size *= 2;
  for (uint32_t i = count + threadIdx.x; i < size; i += kThreads) items[i] = 0;
  __syncthreads();
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t step = run / 2; step > 0; step /= 2) {
      for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
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
