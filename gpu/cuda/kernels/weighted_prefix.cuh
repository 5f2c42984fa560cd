// The shortest prefix, in falling (key, then rising id), whose weights reach a goal: the clusters
// of the highest score that fill a budget, or those of the least worth that free enough room.
//
// One block does it. Weights and counts by the distance to the largest key, in steps of a quarter
// of a power of two where keys are scores, tell which keys must be looked at. If these are few, as
// they mostly are, they are collected and ranked against each other, and those before the goal are
// the prefix. Else a search over the keys' bits, two at a time, narrows the key at which the goal
// is reached: each round sums and counts what lies at or above three candidates, over keys that
// threads hold in registers, with one barrier; it ends as soon as few enough lie above. Only where
// so many keys are equal, or the prefix is so long, that it never comes to this, the search goes on
// to the last bit: the items above are then collected, ties in the order of their ids, and sorted.
#pragma once

#include <cstdint>

namespace clusterkv::gpu::cuda {

// Integers that order as the scores do; NaN goes last, and 0 is kept for "no item".
__device__ inline uint32_t OrderedKey(float score) {
  if (isnan(score)) return 1;
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 ties with 0
  return max(2u, (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u);
}

// (key, id) as one number: rising ids fall.
__device__ inline uint64_t ChosenItem(uint32_t key, uint32_t id) {
  return uint64_t{key} << 32 | (0xffffffffu - id);
}
__device__ inline uint32_t ItemId(uint64_t item) {
  return 0xffffffffu - static_cast<uint32_t>(item);
}

// Items that are ranked against each other: a few rounds of search more cost less than more of
// them.
template <uint32_t kThreads>
constexpr uint32_t kRanked = kThreads < 64 ? kThreads : 64;

// Of the distance to the largest key.
constexpr uint32_t kSteps = 64;
constexpr uint32_t kStepBits = 21;

// kThreads: of the block, 64 to 1,024.
template <uint32_t kThreads>
struct PrefixShared {
  uint32_t sums[2][6][kThreads / 32];  // of the warps, weights and counts; rounds take turns
  uint32_t step_weights[kSteps], step_counts[kSteps];
  uint32_t count, ties, first_tie;
  uint32_t item_weights[kRanked<kThreads>];
};

// Falling. `count` items in place, with room for the next power of two; all threads of the block
// call it. Up to a block's worth of items are ranked against each other, more take a bitonic
// network.
template <uint32_t kThreads>
__device__ void SortFalling(uint64_t* items, uint32_t count) {
  if (count <= 256 && count <= kThreads) {
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

// Of `count` items in any order, at most kRanked, the prefix, in place and falling; the
// rest lies behind it. item_weights are theirs.
template <uint32_t kThreads>
__device__ uint32_t RankPrefix(uint64_t* items, uint32_t count, uint32_t goal,
                               const PrefixShared<kThreads>& shared) {
  const bool has = threadIdx.x < count;
  const uint64_t own = has ? items[threadIdx.x] : 0;
  uint32_t rank = 0, before = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < count; ++i) {
    const bool above = items[i] > own;
    rank += above ? 1 : 0;
    before += above ? shared.item_weights[i] : 0;
  }
  const int taken = __syncthreads_count(has && before < goal ? 1 : 0);
  if (has) items[rank] = own;
  __syncthreads();
  return static_cast<uint32_t>(taken);
}

template <uint32_t kThreads>
__device__ uint32_t LargestOfBlock(uint32_t value, PrefixShared<kThreads>& shared) {
  const uint32_t lane = threadIdx.x % 32;
  value = __reduce_max_sync(0xffffffffu, value);
  if (lane == 0) shared.sums[0][0][threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, lane < kThreads / 32 ? shared.sums[0][0][lane] : 0);
}

// The first step up to which the weights reach the goal, and the items up to it; more items than
// there can be if they do not. By each warp.
template <uint32_t kThreads>
__device__ uint2 FindStep(uint32_t goal, const PrefixShared<kThreads>& shared) {
  static_assert(kSteps == 64 && kThreads >= kSteps);
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t first_weight = shared.step_weights[2 * lane];
  const uint32_t first_count = shared.step_counts[2 * lane];
  uint32_t weight = first_weight + shared.step_weights[2 * lane + 1];
  uint32_t count = first_count + shared.step_counts[2 * lane + 1];
  const uint32_t own_weight = weight, own_count = count;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t other_weight = __shfl_up_sync(0xffffffffu, weight, step);
    const uint32_t other_count = __shfl_up_sync(0xffffffffu, count, step);
    if (lane >= step) weight += other_weight, count += other_count;
  }
  const uint32_t reached = __ballot_sync(0xffffffffu, weight >= goal);
  if (reached == 0) return make_uint2(kSteps, 0xffffffffu);
  const bool by_first = weight - own_weight + first_weight >= goal;
  const uint32_t source = static_cast<uint32_t>(__ffs(static_cast<int>(reached))) - 1;
  return make_uint2(
      __shfl_sync(0xffffffffu, 2 * lane + (by_first ? 0 : 1), source),
      __shfl_sync(0xffffffffu, by_first ? count - own_count + first_count : count, source));
}

// With kPerThread items of each thread in registers; 0: keys and weights are read in every round.
template <uint32_t kThreads, uint32_t kPerThread>
__device__ uint32_t ChoosePrefixOf(const uint32_t* keys, const uint32_t* weights, uint32_t n,
                                   uint32_t goal, uint64_t* chosen, bool sorted,
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
  if (threadIdx.x < kSteps) shared.step_weights[threadIdx.x] = shared.step_counts[threadIdx.x] = 0;
  uint32_t threshold = 0;
  uint32_t at_or_above = n;  // items
  if (n > kRanked<kThreads>) {
    uint32_t largest = 0;
    for_each([&](uint32_t, uint32_t key, uint32_t weight) {
      if (weight != 0) largest = max(largest, key);
    });
    largest = LargestOfBlock<kThreads>(largest, shared);
    for_each([&](uint32_t, uint32_t key, uint32_t weight) {
      const uint32_t step = (largest - key) >> kStepBits;
      if (key == 0 || weight == 0 || step >= kSteps) return;
      atomicAdd(&shared.step_weights[step], weight);
      atomicAdd(&shared.step_counts[step], 1u);
    });
    __syncthreads();
    const uint2 reached = FindStep<kThreads>(goal, shared);
    if (reached.y <= kRanked<kThreads>) {
      const uint32_t distance = (reached.x + 1) << kStepBits;
      threshold = largest >= distance ? largest - distance + 1 : 1;
      at_or_above = reached.y;
    }
  }
  // The largest key that still reaches the goal, bits from above; 0 if all together do not.
  for (int shift = 30; shift >= 0 && at_or_above > kRanked<kThreads>; shift -= 2) {
    uint32_t sums[6] = {};
    for_each([&](uint32_t, uint32_t key, uint32_t weight) {
#pragma unroll
      for (uint32_t c = 0; c < 3; ++c) {
        if (key == 0 || weight == 0 || key < (threshold | (c + 1) << shift)) continue;
        sums[c] += weight;
        ++sums[3 + c];
      }
    });
    auto& warp_sums = shared.sums[(shift / 2) % 2];
#pragma unroll
    for (uint32_t c = 0; c < 6; ++c) {
      const uint32_t sum = __reduce_add_sync(0xffffffffu, sums[c]);
      if (lane == 0) warp_sums[c][warp] = sum;
    }
    __syncthreads();
    // Every warp sums the warps' sums: one read each, instead of one for every warp.
    uint32_t totals[6];
#pragma unroll
    for (uint32_t c = 0; c < 6; ++c) {
      const uint32_t own = lane < kThreads / 32 ? warp_sums[c][lane] : 0;
      totals[c] = __reduce_add_sync(0xffffffffu, own);
    }
    uint32_t digit = 0;
#pragma unroll
    for (uint32_t c = 0; c < 3; ++c) {
      if (totals[c] < goal) continue;
      digit = c + 1;
      at_or_above = totals[3 + c];
    }
    threshold |= digit << shift;
  }
  if (at_or_above <= kRanked<kThreads>) {
    __syncthreads();  // the count is 0
    for_each([&](uint32_t i, uint32_t key, uint32_t weight) {
      if (key == 0 || weight == 0 || key < threshold) return;
      const uint32_t place = atomicAdd(&shared.count, 1u);
      chosen[place] = ChosenItem(key, i);
      shared.item_weights[place] = weight;
    });
    __syncthreads();
    return RankPrefix<kThreads>(chosen, shared.count, goal, shared);
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
  if (sorted) SortFalling<kThreads>(chosen, shared.count);
  return shared.count;
}

// keys, weights: [n]; key 0 or weight 0: not an item. chosen: room for every item that could be,
// the next power of two, and at least kThreads or n. Returns how many were chosen; they come first,
// in falling order if `sorted`. All kThreads threads of the block call it.
template <uint32_t kThreads>
__device__ uint32_t ChoosePrefix(const uint32_t* keys, const uint32_t* weights, uint32_t n,
                                 uint32_t goal, uint64_t* chosen, bool sorted,
                                 PrefixShared<kThreads>& shared) {
  if (n <= kThreads)
    return ChoosePrefixOf<kThreads, 1>(keys, weights, n, goal, chosen, sorted, shared);
  if (n <= 4 * kThreads)
    return ChoosePrefixOf<kThreads, 4>(keys, weights, n, goal, chosen, sorted, shared);
  if (n <= 8 * kThreads) {
    return ChoosePrefixOf<kThreads, 8>(keys, weights, n, goal, chosen, sorted, shared);
  }
  if (n <= 16 * kThreads) {
    return ChoosePrefixOf<kThreads, 16>(keys, weights, n, goal, chosen, sorted, shared);
  }
  return ChoosePrefixOf<kThreads, 0>(keys, weights, n, goal, chosen, sorted, shared);
}

}  // namespace clusterkv::gpu::cuda
