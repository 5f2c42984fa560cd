// What the blocks of a team hold and send each other in DecodeLayer.
#pragma once

#include <cooperative_groups.h>

#include <cfloat>

#include "gpu/cuda/kernels/attend_tile.cuh"
#include "gpu/cuda/kernels/block_sums.cuh"
#include "gpu/cuda/kernels/cluster_cache.cuh"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda::layer {

namespace cg = cooperative_groups;

constexpr uint32_t kWarps = 8;
constexpr uint32_t kThreads = 32 * kWarps;
constexpr uint32_t kMostBlocks = 16;  // of a team; more than 8 are not portable

// What the first block found, for all blocks.
struct LayerPlan {
  uint32_t stale;     // 1: the state is not this slot's
  uint32_t listed;    // rows on the list: the resident ones, then the missed ones
  uint32_t resident;  // of these
  // Rows of the last missed cluster that are not attended, but kept.
  uint32_t rest, rest_offset, rest_miss;
  uint32_t free_top;  // free slots before the misses take theirs
};

template <int kHeadDim>
struct LayerShared {
  TileRows<kHeadDim> queries;
  WarpSums<kWarps> sums;
  // From each block of the team, by query head: largest and sum. Of the scores, then of the
  // weights.
  float2 received[kMostBlocks][kMaxGroup];
  float largest[kMaxGroup], inverse_sum[kMaxGroup];  // of the scores
  float factors[kMostBlocks][kMaxGroup];             // what each block's output weighs
  LayerPlan plan;
  SharedSlot slot;
  // Of the first block.
  uint2 chunks_of;  // the scratch's chunk_steps of the slot
  EvictShared<kThreads> evict;
  BlockSums<kThreads, 3> chosen_sums;
  uint32_t trimmed;  // rows of the last chosen cluster that the budget leaves out
  bool trimmed_missed, damaged;
};

// Behind LayerShared, in dynamic shared memory: the list, what the other blocks send of the output,
// and an area that first holds scores and choice, then the warps' tiles and outputs.
struct LayerBytes {
  uint32_t list, partials, area, total;
};

__host__ __device__ constexpr uint32_t RoundUp(uint32_t bytes) { return (bytes + 127) / 128 * 128; }

// What ChoosePrefix needs.
__host__ __device__ constexpr uint32_t ChosenRoom(uint32_t budget) {
  uint32_t room = kThreads;
  while (room < budget) room *= 2;
  return room;
}

// Chunks of four elements of a query head that a block owns, at most.
__host__ __device__ constexpr uint32_t OwnChunks(uint32_t head_dim, uint32_t blocks) {
  return (head_dim / 4 + blocks - 1) / blocks;
}

// The first part of the area: chosen first, since its size depends on the budget alone.
struct Choice {
  uint64_t* chosen;  // [ChosenRoom]
  float* scores;     // [group][stride]: of clusters from `base` on
  uint32_t stride, base;
  bool in_shared;  // keys, weights and rows: else in device memory
  // [clusters]; rows: first row, with the top bit if it is not resident.
  uint32_t *keys, *weights, *rows;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// An entry of the list: a row of the row space, or a row of a missed cluster.
constexpr uint32_t kMissed = 1u << 31;
constexpr uint32_t kOffsetBits = 15;
constexpr uint32_t kOffsetMask = (1u << kOffsetBits) - 1;
static_assert(kMostLayerBudget <= kOffsetMask);

// One that was chosen, until its rows are listed: [63] missed, [62:48] rows attended, [47:32] where
// they begin among the resident or the missed ones, [31:0] first row, or which miss it is.
__device__ inline uint64_t PackChosen(bool missed, uint32_t take, uint32_t begin, uint32_t where) {
  return uint64_t{missed} << 63 | uint64_t{take} << 48 | uint64_t{begin} << 32 | where;
}

// Where this block's scores lie, and where the first block's keys do in its own shared memory (or
// in device memory, if they are too many).
__device__ inline Choice LayOut(unsigned char* area, uint32_t area_bytes, uint32_t chosen_room,
                                uint32_t clusters, uint32_t begin, uint32_t share, uint32_t group,
                                const DecodeScratch& scratch, size_t item) {
  Choice choice;
  choice.chosen = reinterpret_cast<uint64_t*>(area);
  const uint64_t scores = uint64_t{8} * chosen_room;
  const uint64_t keys = scores + uint64_t{4} * group * share;
  choice.in_shared = keys + uint64_t{12} * clusters <= area_bytes;
  if (choice.in_shared) {
    choice.scores = reinterpret_cast<float*>(area + scores);
    choice.stride = share;
    choice.base = begin;
    choice.keys = reinterpret_cast<uint32_t*>(area + keys);
    choice.weights = choice.keys + clusters;
  } else {
    choice.scores = scratch.scores + item * scratch.score_stride;
    choice.stride = scratch.clusters;
    choice.base = 0;
    choice.keys = scratch.keys + item * 3 * scratch.clusters;
    choice.weights = choice.keys + clusters;
  }
  choice.rows = choice.weights + clusters;
  return choice;
}

// Largest and sum of powers of two of this block's scores, to all blocks. A warp for a query head.
template <int kHeadDim>
__device__ void SendScoreSums(const Choice& choice, uint32_t begin, uint32_t end, uint32_t group,
                              cg::cluster_group& team, LayerShared<kHeadDim>& shared) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t g = threadIdx.x / 32; g < group; g += kWarps) {
    const float* const own = choice.scores + size_t{g} * choice.stride;
    float most = -FLT_MAX;
    for (uint32_t c = begin + lane; c < end; c += 32) most = fmaxf(most, own[c - choice.base]);
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    }
    float sum = 0.0f;
    for (uint32_t c = begin + lane; c < end; c += 32) sum += exp2f(own[c - choice.base] - most);
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (lane >= gridDim.x) continue;
    *team.map_shared_rank(&shared.received[blockIdx.x][g], lane) = make_float2(most, sum);
  }
}

// All blocks' largest and sum of a query head, kMaxGroup heads at a time by as many lanes each:
// lane r of a head's has block r's. body(g, largest and sum of all, r, largest of r).
template <int kHeadDim, typename Body>
__device__ void ForReceived(const LayerShared<kHeadDim>& shared, uint32_t group, float nothing,
                            const Body& body) {
  static_assert(kMostBlocks == kMaxGroup && kThreads == kMostBlocks * kMaxGroup);
  const uint32_t g = threadIdx.x / kMostBlocks, r = threadIdx.x % kMostBlocks;
  const float2 own =
      g < group && r < gridDim.x ? shared.received[r][g] : make_float2(nothing, 0.0f);
  float most = own.x;
#pragma unroll
  for (uint32_t step = kMostBlocks / 2; step > 0; step /= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  float sum = own.x == -INFINITY ? 0.0f : exp2f(own.x - most) * own.y;
#pragma unroll
  for (uint32_t step = kMostBlocks / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
  if (g < group) body(g, make_float2(most, sum), r, own.x);
}

#endif

}  // namespace clusterkv::gpu::cuda::layer
