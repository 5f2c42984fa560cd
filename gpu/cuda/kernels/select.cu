// Select: which clusters a KV head attends to (ClusterKV section III-C, shared by its query heads).
//
//   blocks (split, KV head, slot):  scores q·mu * scale of a range of centroids ─► scratch
//   the last block of a head:       group rule ─► keys ─► prefix to the budget ─► lists
//                                             └─► the running means that Fetch evicts by
//
// Reads each visible centroid once, group x head_dim x 2 FLOPs for each; the second part is
// latency: about a dozen barriers over data in L2. The host backend chooses the same wherever
// scores differ by more than rounding.
#include <cfloat>

#include "gpu/cuda/kernels/centroid_scores.cuh"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/overlapped_launch.cuh"
#include "gpu/cuda/kernels/state_access.cuh"
#include "gpu/cuda/kernels/weighted_prefix.cuh"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kThreads = 512;
constexpr uint32_t kLeastPerBlock = 64;  // centroids that are worth a block
constexpr uint32_t kInShared = 4096;     // clusters whose keys and sizes fit shared memory
constexpr uint32_t kChosenInShared = 1024;

struct SelectShared {
  uint4 queries[kMaxGroup * 256 / 8];  // TileRows of the head_dim
  float largest[kMaxGroup], inverse_sum[kMaxGroup];
  float warp_values[4][kThreads / 32];
  uint32_t taken_before;
  bool last;
  SharedSlot slot;
  PrefixShared<kThreads> prefix;
  uint64_t chosen[kChosenInShared];
  uint32_t keys[kInShared], weights[kInShared];
};

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Plus {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Reduces one value of each thread for each of up to four query heads; the result to all.
template <typename Operation>
__device__ void ReduceHeads(float (&values)[4], float nothing, SelectShared& shared,
                            Operation operation) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto reduce = [&](float value) {
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) {
      value = operation(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    return value;
  };
#pragma unroll
  for (uint32_t h = 0; h < 4; ++h) {
    values[h] = reduce(values[h]);
    if (lane == 0) shared.warp_values[h][warp] = values[h];
  }
  __syncthreads();
#pragma unroll
  for (uint32_t h = 0; h < 4; ++h) {
    values[h] = reduce(lane < kThreads / 32 ? shared.warp_values[h][lane] : nothing);
  }
  __syncthreads();
}

// Of each query head the largest score and the sum of powers of two, four heads at a time.
__device__ void SumPowers(const float* scores, uint32_t stride, uint32_t clusters, uint32_t group,
                          SelectShared& shared) {
  for (uint32_t first = 0; first < group; first += 4) {
    const uint32_t heads = min(4u, group - first);
    const float* const own = scores + size_t{first} * stride;
    float largest[4] = {-FLT_MAX, -FLT_MAX, -FLT_MAX, -FLT_MAX};
#pragma unroll 2
    for (uint32_t c = threadIdx.x; c < clusters; c += kThreads) {
#pragma unroll
      for (uint32_t h = 0; h < 4; ++h) {
        if (h < heads) largest[h] = fmaxf(largest[h], own[h * size_t{stride} + c]);
      }
    }
    ReduceHeads(largest, -FLT_MAX, shared, Larger());
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (uint32_t c = threadIdx.x; c < clusters; c += kThreads) {
#pragma unroll
      for (uint32_t h = 0; h < 4; ++h) {
        if (h < heads) sums[h] += exp2f(own[h * size_t{stride} + c] - largest[h]);
      }
    }
    ReduceHeads(sums, 0.0f, shared, Plus());
#pragma unroll
    for (uint32_t h = 0; h < 4; ++h) {
      if (threadIdx.x != 0 || h >= heads) continue;
      shared.largest[first + h] = largest[h];
      shared.inverse_sum[first + h] = 1.0f / sums[h];
    }
  }
}

// The second part, by one block. `scores` are complete.
__device__ void Choose(const DeviceState& state, uint32_t layer, uint32_t kv_head, uint32_t budget,
                       uint32_t group, uint32_t clusters, float* scores, uint32_t stride,
                       uint64_t* chosen, uint32_t* taken, SelectShared& shared) {
  const StateBlock& block = state.block();
  const size_t head = HeadIndex(block, layer, kv_head);
  const ClusterEntry* const entries = state.clusters(head);
  float* const mean_scores = state.mean_scores(head);
  const GroupRule rule = block.group;
  if (rule == GroupRule::kSoftmax) SumPowers(scores, stride, clusters, group, shared);
  __syncthreads();
  // Small enough they stay in shared memory; else the first head's scores make room for the keys.
  const bool in_shared = clusters <= kInShared;
  uint32_t* const keys = in_shared ? shared.keys : reinterpret_cast<uint32_t*>(scores);
  uint32_t* const weights = in_shared ? shared.weights : taken;
  for (uint32_t c = threadIdx.x; c < clusters; c += kThreads) {
    const float combined =
        CombineScores(rule, scores + c, stride, group, shared.largest, shared.inverse_sum);
    mean_scores[c] = NextMeanCombined(rule, mean_scores[c], combined);
    keys[c] = OrderedKey(combined);
    weights[c] = state.ClusterTokens(entries[c]);
  }
  __syncthreads();
  // The chosen have a token each at least.
  if (min(clusters, budget) <= kChosenInShared) chosen = shared.chosen;
  uint32_t count =
      ChoosePrefix<kThreads>(keys, weights, clusters, budget, chosen, true, shared.prefix);
  count = min(count, block.budget_tokens);
  if (block.estimate != 0) {
    for (uint32_t c = threadIdx.x; !in_shared && c < clusters; c += kThreads) weights[c] = 0;
    for (uint32_t c = threadIdx.x; in_shared && c < clusters; c += kThreads) taken[c] = 0;
    __syncthreads();
  }
  // All are taken whole but the last, which is trimmed to what is left of the budget.
  uint32_t* const list = state.selected_cluster(kv_head);
  uint32_t* const take = state.selected_take(kv_head);
  uint32_t before = 0;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t cluster = ItemId(chosen[i]);
    const uint32_t tokens = state.ClusterTokens(entries[cluster]);
    list[i] = cluster;
    take[i] = tokens;
    before += i + 1 < count ? tokens : 0;
  }
  for (uint32_t step = 16; step > 0; step /= 2) {
    before += __shfl_xor_sync(0xffffffffu, before, step);
  }
  if (threadIdx.x == 0) shared.taken_before = 0;
  __syncthreads();
  if (threadIdx.x % 32 == 0 && before > 0) atomicAdd(&shared.taken_before, before);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (count > 0) {
      const uint32_t left = budget - min(budget, shared.taken_before);
      take[count - 1] = min(take[count - 1], left);
    }
    state.selected_count(kv_head) = count;
  }
  if (block.estimate != 0) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) taken[list[i]] = take[i];
  }
}

template <typename Storage, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    SelectKernel(const BatchTable* table, uint32_t layer, QueryLaunch queries, uint32_t group,
                 uint32_t budget) {
  FollowPredecessor();
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<SelectShared*>(shared_bytes);
  if (EnterSlot(table, blockIdx.z, shared.slot) != Entry::kCurrent) return;
  const DeviceState state(shared.slot.slot);
  const StateBlock& block = state.block();
  const uint32_t kv_head = blockIdx.y;
  const size_t head = HeadIndex(block, layer, kv_head);
  const DecodeScratch& scratch = table->scratch;
  const uint32_t clusters =
      min(state.VisibleClusters(head, shared.slot.latch.segments), scratch.clusters);
  budget = min(budget, block.budget_tokens);
  const size_t item = size_t{blockIdx.z} * gridDim.y + kv_head;
  float* const scores = scratch.scores + item * scratch.score_stride;

  const uint32_t share = (clusters + gridDim.x - 1) / gridDim.x;
  const uint32_t begin = min(clusters, blockIdx.x * share);
  const uint32_t end = min(clusters, begin + share);
  auto& rows = reinterpret_cast<TileRows<kHeadDim>&>(shared.queries);
  StartGroupQueries<kHeadDim, kThreads>(queries, blockIdx.z, kv_head, group, rows);
  WaitCopies<0>();
  __syncthreads();
  if (budget > 0) {
    const size_t stride = scratch.clusters;
    ScoreCentroids<Storage, kHeadDim, kThreads>(state.centroids(head), begin, end, rows,
                                                block.softmax_scale * kLog2E,
                                                [&](uint32_t g, uint32_t cluster, float score) {
                                                  if (g < group)
                                                    scores[g * stride + cluster] = score;
                                                });
  }
  if (gridDim.x > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t ticket = atomicAdd(&scratch.select_tickets[item], 1u);
      shared.last = ticket + 1 == gridDim.x;
      if (shared.last) scratch.select_tickets[item] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!shared.last) return;
  } else {
    __syncthreads();
  }
  if (clusters == 0 || budget == 0) {
    if (threadIdx.x == 0) state.selected_count(kv_head) = 0;
    uint32_t* const taken = scratch.taken + item * scratch.clusters;
    for (uint32_t c = threadIdx.x; block.estimate != 0 && c < clusters; c += kThreads) taken[c] = 0;
    return;
  }
  Choose(state, layer, kv_head, budget, group, clusters, scores, scratch.clusters,
         scratch.chosen + item * scratch.chosen_stride, scratch.taken + item * scratch.clusters,
         shared);
}

template <typename Storage, int kHeadDim>
cudaError_t Launch(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                   uint32_t budget, uint32_t clusters, cudaStream_t stream) {
  const auto kernel = SelectKernel<Storage, kHeadDim>;
  const cudaError_t sized = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SelectShared));
  if (sized != cudaSuccess) return sized;
  const uint32_t heads = shape.count * shape.kv_heads;
  uint32_t splits = (2 * static_cast<uint32_t>(shape.multiprocessors) + heads - 1) / heads;
  const uint32_t most = clusters / kLeastPerBlock;
  if (splits > most) splits = most;
  if (splits < 1) splits = 1;
  const dim3 grid(splits, shape.kv_heads, shape.count);
  return LaunchOverlapped(shape.overlap, kernel, grid, kThreads, sizeof(SelectShared), stream,
                          shape.table, layer, queries, shape.group, budget);
}

template <typename Storage>
cudaError_t LaunchFor(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                      uint32_t budget, uint32_t clusters, cudaStream_t stream) {
  switch (shape.head_dim) {
    case 64:
      return Launch<Storage, 64>(shape, layer, queries, budget, clusters, stream);
    case 96:
      return Launch<Storage, 96>(shape, layer, queries, budget, clusters, stream);
    case 128:
      return Launch<Storage, 128>(shape, layer, queries, budget, clusters, stream);
    case 256:
      return Launch<Storage, 256>(shape, layer, queries, budget, clusters, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LaunchSelect(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                         uint32_t budget_tokens, uint32_t clusters, cudaStream_t stream) {
  return shape.bf16 ? LaunchFor<Bf16>(shape, layer, queries, budget_tokens, clusters, stream)
                    : LaunchFor<Fp16>(shape, layer, queries, budget_tokens, clusters, stream);
}

}  // namespace clusterkv::gpu::cuda
