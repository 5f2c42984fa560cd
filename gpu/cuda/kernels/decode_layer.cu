// DecodeLayer: select, fetch and attend of a layer in one launch (Hopper and later).
//
// A team of blocks, a thread block cluster, has one KV head of one slot:
//
//   every block:  scores its share of the centroids ─► maxima and sums to all blocks
//                 its keys, sizes, residence ─► the first block
//   the first:    prefix to the budget ─► touch, evict, slots for misses ─► a list of rows
//   every block:  attends to its share of sinks, window, resident rows; then of the missed ones,
//                 which come from the host store into the tile and go on to their slots
//                 partial outputs ─► the blocks that own the elements ─► output, log-sum-exp
//
// What passes between the blocks lies in their shared memory. Resident rows come first, so that
// the misses are on their way over PCIe while other warps attend. The outcome is that of Select,
// Fetch and Attend, but the slot table, which stays empty. Cost: the bytes of centroids and rows;
// at batch 1 the latency of four barriers and about six dependent reads of device memory.
#include <cooperative_groups.h>

#include <algorithm>
#include <cfloat>

#include "gpu/cuda/kernels/attend_tile.cuh"
#include "gpu/cuda/kernels/attended_rows.cuh"
#include "gpu/cuda/kernels/block_sums.cuh"
#include "gpu/cuda/kernels/centroid_scores.cuh"
#include "gpu/cuda/kernels/cluster_cache.cuh"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/overlapped_launch.cuh"
#include "gpu/cuda/kernels/state_access.cuh"
#include "gpu/cuda/kernels/weighted_prefix.cuh"

namespace clusterkv::gpu::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr uint32_t kWarps = 8;
constexpr uint32_t kThreads = 32 * kWarps;
constexpr uint32_t kMostBlocks = 16;  // of a team; more than 8 are not portable
// Bytes of the area, unless tiles take more: so that two blocks fit a multiprocessor, or one.
constexpr uint32_t kMostArea = 92 << 10;
constexpr uint32_t kMostAreaAlone = 176 << 10;
constexpr uint32_t kMostShared = 227 << 10;  // of a block
template <int kHeadDim>
constexpr uint32_t kResident = kHeadDim <= 128 ? 2 : 1;  // blocks of a multiprocessor

// What the first block found, for all blocks.
struct LayerPlan {
  uint32_t stale;   // 1: the state is not this slot's
  uint32_t listed;  // rows on the list: the resident ones, then the missed ones
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
  uint32_t *keys, *weights,
      *rows;  // [clusters]; rows: first row, with the top bit if it is not resident
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// An entry of the list: a row of the row space, or a row of a missed cluster.
constexpr uint32_t kMissed = 1u << 31;
constexpr uint32_t kOffsetBits = 15;
constexpr uint32_t kOffsetMask = (1u << kOffsetBits) - 1;
static_assert(kMostLayerBudget <= kOffsetMask);

// One that was chosen, until its rows are listed: [63] missed, [62:48] rows attended, [47:32] where
// they begin among the resident or the missed ones, [31:0] first row, or which miss it is.
__device__ uint64_t PackChosen(bool missed, uint32_t take, uint32_t begin, uint32_t where) {
  return uint64_t{missed} << 63 | uint64_t{take} << 48 | uint64_t{begin} << 32 | where;
}

// Where this block's scores lie, and where the first block's keys do in its own shared memory (or
// in device memory, if they are too many).
__device__ Choice LayOut(unsigned char* area, uint32_t area_bytes, uint32_t chosen_room,
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

template <int kHeadDim>
__device__ float CombineScores(GroupRule rule, const Choice& choice, uint32_t cluster,
                               uint32_t group, const LayerShared<kHeadDim>& shared) {
  const float* const scores = choice.scores + (cluster - choice.base);
  float combined = rule == GroupRule::kMax ? scores[0] : 0.0f;
  for (uint32_t g = 0; g < group; ++g) {
    const float own = scores[size_t{g} * choice.stride];
    if (rule == GroupRule::kSoftmax) {
      combined += exp2f(own - shared.largest[g]) * shared.inverse_sum[g];
    } else if (rule == GroupRule::kMax) {
      combined = fmaxf(combined, own);
    } else {
      combined += own / static_cast<float>(group);
    }
  }
  return combined;
}

// The first block: what is chosen, how the cache changes, and the list of rows.
template <int kHeadDim>
__device__ LayerPlan Choose(const DeviceState& state, uint32_t layer, uint32_t kv_head,
                            uint32_t budget, uint32_t clusters, const Choice& choice,
                            const DecodeScratch& scratch, size_t item, uint32_t* list,
                            uint32_t* fault, LayerShared<kHeadDim>& shared) {
  const StateBlock& block = state.block();
  const size_t head = HeadIndex(block, layer, kv_head);
  const uint32_t step = shared.slot.latch.step;
  const ClusterEntry* const entries = state.clusters(head);
  uint32_t* const last_used = state.last_used(head);
  uint32_t* const selected = state.selected_cluster(kv_head);
  uint32_t* const selected_take = state.selected_take(kv_head);
  MissedCluster* const missed_clusters = scratch.misses + item * scratch.clusters;
  if (threadIdx.x == 0) {
    shared.damaged = shared.evict.damaged = false;
    shared.trimmed = 0;
    shared.trimmed_missed = false;
  }
  uint32_t count = 0;
  if (clusters > 0 && budget > 0) {
    count = ChoosePrefix<kThreads>(choice.keys, choice.weights, clusters, budget, choice.chosen,
                                   true, shared.evict.prefix);
    count = min(count, budget);
  }
  __syncthreads();

  uint32_t hit_tokens = 0, missed_tokens = 0, misses = 0;
  for (uint32_t begin = 0; begin < count; begin += kThreads) {
    const uint32_t i = begin + threadIdx.x;
    uint32_t cluster = 0, tokens = 0, row = 0;
    bool missed = false;
    if (i < count) {
      cluster = ItemId(choice.chosen[i]);
      row = choice.rows[cluster];
      missed = (row & kMissed) != 0;
      row &= ~kMissed;
      tokens =
          uint64_t{row} + choice.weights[cluster] <= block.max_rows ? choice.weights[cluster] : 0;
    }
    uint32_t totals[3], before[3] = {missed ? 0 : tokens, missed ? tokens : 0, missed ? 1u : 0u};
    ExclusiveSums(before, totals, shared.chosen_sums);
    before[0] += hit_tokens, before[1] += missed_tokens, before[2] += misses;
    hit_tokens += totals[0], missed_tokens += totals[1], misses += totals[2];
    if (i >= count) continue;
    // All are taken whole but the last, which is trimmed to what is left of the budget.
    const uint32_t take = min(tokens, budget - min(budget, before[0] + before[1]));
    selected[i] = cluster;
    selected_take[i] = take;
    if (block.estimate != 0) scratch.taken[item * scratch.clusters + cluster] = take;
    if (i + 1 == count) {
      shared.trimmed = tokens - take;
      shared.trimmed_missed = missed;
    }
    // In a damaged state clusters overlap, and sums mean nothing.
    const uint32_t list_begin = min(missed ? before[1] : before[0], budget);
    if (!missed) {
      last_used[cluster] = step;
      choice.chosen[i] = PackChosen(false, take, list_begin, row);
      continue;
    }
    const ClusterEntry entry = entries[cluster];
    const std::byte* const chunk =
        FindChunk(shared.slot.slot, shared.slot.latch, scratch, blockIdx.z, entry.chunk);
    if (chunk == nullptr) {
      Report(fault, KernelFault::kChunkNotMapped, entry.chunk);
      shared.damaged = true;
    }
    missed_clusters[before[2]] = {chunk + size_t{16} * entry.chunk_offset, row, before[1]};
    choice.chosen[i] = PackChosen(true, take, list_begin, before[2]);
  }
  __syncthreads();

  LayerPlan plan = {};
  bool sound = !shared.damaged && shared.evict.freed <= block.cache_tokens &&
               missed_tokens <= block.cache_tokens;
  if (sound && missed_tokens > shared.evict.freed) {
    const uint32_t needed = missed_tokens - shared.evict.freed;
    __syncthreads();  // all know how many
    Evict<kThreads>(state, head, clusters, needed, step, choice.keys, choice.weights,
                    scratch.chosen + item * scratch.chosen_stride, shared.evict);
    sound = !shared.evict.damaged && shared.evict.freed >= missed_tokens;
  }
  if (sound) {
    const uint32_t resident = hit_tokens - (shared.trimmed_missed ? 0 : shared.trimmed);
    plan.listed = min(budget, hit_tokens + missed_tokens);
    plan.free_top = shared.evict.freed;
    if (shared.trimmed_missed) {
      plan.rest = shared.trimmed;
      plan.rest_miss = misses - 1;
      plan.rest_offset = missed_tokens - missed_clusters[misses - 1].before - shared.trimmed;
    }
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t i = threadIdx.x / 32; i < count; i += kWarps) {
      const uint64_t chosen = choice.chosen[i];
      const bool missed = chosen >> 63 != 0;
      const auto where = static_cast<uint32_t>(chosen);
      const uint32_t take = static_cast<uint32_t>(chosen >> 48) & kOffsetMask;
      const uint32_t begin =
          (static_cast<uint32_t>(chosen >> 32) & 0xffff) + (missed ? resident : 0);
      for (uint32_t r = lane; r < take; r += 32) {
        if (begin + r < budget) {
          list[begin + r] = missed ? kMissed | where << kOffsetBits | r : where + r;
        }
      }
      if (missed && lane == 0) last_used[selected[i]] = step;
    }
  }
  if (threadIdx.x != 0) return plan;
  state.selected_count(kv_head) = count;
  state.slot_count(kv_head) = 0;
  if (!sound) {
    Report(fault, KernelFault::kDamagedState, layer);
    return plan;
  }
  state.free_count(head) = shared.evict.freed - missed_tokens;
  LayerCounters& counters = state.counters(layer);
  const auto add = [](uint64_t& counter, uint64_t amount) {
    if (amount > 0) atomicAdd(reinterpret_cast<unsigned long long*>(&counter), amount);
  };
  add(counters.hit_clusters, count - misses);
  add(counters.missed_clusters, misses);
  add(counters.hit_tokens, hit_tokens);
  add(counters.missed_tokens, missed_tokens);
  add(counters.gathered_bytes, missed_tokens * state.row_bytes());
  return plan;
}

// Rows in the order sinks, window, estimates, resident, missed, and those only kept.
struct RowFinder {
  const DeviceState& state;
  const LayerPlan& plan;
  const uint32_t* list;  // in the first block
  const MissedCluster* misses;
  const uint32_t* taken;
  uint32_t* fault;
  size_t head;
  uint32_t layer, sinks, estimates;
  WindowRows window;

  __device__ uint32_t rows() const {
    return sinks + window.count + estimates + plan.listed + plan.rest;
  }
  __device__ TileRow operator()(uint32_t index) const {
    if (index < sinks) return ExactRow(state, state.sink(head, index));
    if ((index -= sinks) < window.count) {
      return ExactRow(state, state.window(head, window.begin + index));
    }
    if ((index -= window.count) < estimates) return EstimateRow(state, head, index, taken);
    if ((index -= estimates) < plan.listed) {
      const uint32_t entry = list[index];
      if ((entry & kMissed) != 0) {
        return Missed((entry & ~kMissed) >> kOffsetBits, entry & kOffsetMask, 0.0f);
      }
      const uint32_t slot = state.slot_of_row(head)[entry];
      return slot < state.block().cache_tokens ? ExactRow(state, state.cache(head, slot))
                                               : Damaged();
    }
    if ((index -= plan.listed) < plan.rest) {
      return Missed(plan.rest_miss, plan.rest_offset + index, -INFINITY);
    }
    return {};
  }

 private:
  // Takes its slot on the way.
  __device__ TileRow Missed(uint32_t miss, uint32_t offset, float bias) const {
    const MissedCluster cluster = misses[miss];
    const uint32_t slot = state.free_slots(head)[plan.free_top - 1 - (cluster.before + offset)];
    if (slot >= state.block().cache_tokens) return Damaged();
    state.slot_of_row(head)[cluster.first_row + offset] = slot;
    TileRow row;
    row.key = cluster.source + offset * state.row_bytes();
    row.value = row.key + state.mean_bytes();
    row.kept = state.cache(head, slot);
    row.bias = bias;
    return row;
  }
  __device__ TileRow Damaged() const {
    Report(fault, KernelFault::kDamagedState, layer);
    return {};
  }
};

template <typename Storage, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kResident<kHeadDim>)
    DecodeLayerKernel(const BatchTable* table, uint32_t layer, QueryLaunch queries, uint32_t group,
                      uint32_t launch_budget, OutputLaunch target, LayerBytes bytes,
                      uint32_t* fault) {
  FollowPredecessor();
  cg::cluster_group team = cg::this_cluster();
  team.barrier_arrive();  // waited for before the first write to another block
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<LayerShared<kHeadDim>*>(shared_bytes);
  auto* const list = reinterpret_cast<uint32_t*>(shared_bytes + bytes.list);
  auto* const partials = reinterpret_cast<float4*>(shared_bytes + bytes.partials);
  unsigned char* const area = shared_bytes + bytes.area;
  const uint32_t rank = blockIdx.x, kv_head = blockIdx.y;

  StartGroupQueries<kHeadDim, kThreads>(queries, blockIdx.z, kv_head, group, shared.queries);
  const Entry entry = EnterSlot(table, blockIdx.z, shared.slot);
  if (entry == Entry::kSkip) return;  // all blocks of the team do
  const DeviceState state(shared.slot.slot);
  const StateBlock& block = state.block();
  const size_t head = HeadIndex(block, layer, kv_head);
  const size_t item = size_t{blockIdx.z} * gridDim.y + kv_head;
  const DecodeScratch& scratch = table->scratch;
  // A block that finds the state stale goes on with no clusters: all must meet at the barriers, and
  // the first one's finding counts.
  const uint32_t clusters =
      entry == Entry::kCurrent
          ? min(state.VisibleClusters(head, shared.slot.latch.segments), scratch.clusters)
          : 0;
  if (rank == 0 && threadIdx.x == 0 && entry == Entry::kCurrent) {
    shared.evict.freed = state.free_count(head);
  }
  const uint32_t budget = min(launch_budget, block.budget_tokens);
  const uint32_t share = (clusters + gridDim.x - 1) / gridDim.x;
  const uint32_t begin = min(clusters, rank * share);
  const uint32_t end = min(clusters, begin + share);
  const Choice choice = LayOut(area, bytes.total - bytes.area, ChosenRoom(launch_budget), clusters,
                               begin, share, group, scratch, item);
  const ClusterEntry* const entries = state.clusters(head);
  const uint32_t* const last_used = state.last_used(head);
  // Of the thread's first cluster, now already: the centroids take as long.
  ClusterEntry first_entry = {};
  uint32_t first_used = 0;
  if (begin + threadIdx.x < end) {
    first_entry = entries[begin + threadIdx.x];
    first_used = last_used[begin + threadIdx.x];
  }
  WaitCopies<0>();
  __syncthreads();
  const float scale = block.softmax_scale * kLog2E;
  ScoreCentroids<Storage, kHeadDim, kThreads>(
      state.centroids(head), begin, end, shared.queries, scale,
      [&](uint32_t g, uint32_t cluster, float score) {
        if (g < group) choice.scores[size_t{g} * choice.stride + cluster - choice.base] = score;
      });
  __syncthreads();
  team.barrier_wait();
  if (block.group == GroupRule::kSoftmax) {
    SendScoreSums(choice, begin, end, group, team, shared);
    team.sync();
    ForReceived(shared, group, -FLT_MAX, [&](uint32_t g, float2 of_all, uint32_t r, float) {
      if (r != 0) return;
      shared.largest[g] = of_all.x;
      shared.inverse_sum[g] = 1.0f / of_all.y;
    });
    __syncthreads();
  }
  {
    // The first block's arrays lie where this one's would, if it were the first.
    uint32_t* const keys = choice.in_shared ? team.map_shared_rank(choice.keys, 0) : choice.keys;
    for (uint32_t c = begin + threadIdx.x; c < end; c += kThreads) {
      const bool first = c == begin + threadIdx.x;
      const ClusterEntry cluster = first ? first_entry : entries[c];
      const uint32_t resident = (first ? first_used : last_used[c]) != 0 ? 0 : kMissed;
      keys[c] = OrderedKey(CombineScores(block.group, choice, c, group, shared));
      keys[clusters + c] = state.ClusterTokens(cluster);
      keys[2 * clusters + c] = (cluster.first_row & ~kMissed) | resident;
      if (block.estimate != 0) scratch.taken[item * scratch.clusters + c] = 0;
    }
  }
  team.sync();
  if (rank == 0) {
    LayerPlan plan = {};
    if (entry == Entry::kCurrent) {
      plan = Choose(state, layer, kv_head, budget, clusters, choice, scratch, item, list, fault,
                    shared);
    } else {
      plan.stale = 1;
    }
    if (threadIdx.x < gridDim.x) *team.map_shared_rank(&shared.plan, threadIdx.x) = plan;
  }
  team.sync();

  WarpAttention<Storage, kHeadDim> attention;
  if (shared.plan.stale == 0) {
    const RowFinder finder = {.state = state,
                              .plan = shared.plan,
                              .list = team.map_shared_rank(list, 0),
                              .misses = scratch.misses + item * scratch.clusters,
                              .taken = scratch.taken + item * scratch.clusters,
                              .fault = fault,
                              .head = head,
                              .layer = layer,
                              .sinks = min(block.sink_tokens, shared.slot.latch.length),
                              .estimates = block.estimate != 0 ? clusters : 0,
                              .window = FindWindow(block, shared.slot.latch)};
    attention.Attend(rank + threadIdx.x / 32 * gridDim.x, kWarps * gridDim.x,
                     (finder.rows() + kTileRows - 1) / kTileRows, finder, shared.queries, scale,
                     reinterpret_cast<const std::byte*>(&state.header()),
                     reinterpret_cast<Tile<kHeadDim>*>(area)[threadIdx.x / 32]);
  }
  auto* const outputs = reinterpret_cast<float*>(area);
  ShareOutputs(attention, group, outputs, shared.sums);
  // Of a query head's chunks of four elements each block owns every gridDim.x-th.
  constexpr uint32_t kChunks = kHeadDim / 4;
  const uint32_t shift = __ffs(static_cast<int>(gridDim.x)) - 1;
  const uint32_t own_chunks = OwnChunks(kHeadDim, gridDim.x);
  for (uint32_t i = threadIdx.x; i < group * kChunks; i += kThreads) {
    const uint32_t g = i / kChunks, chunk = i % kChunks;
    *team.map_shared_rank(&partials[(rank * group + g) * own_chunks + (chunk >> shift)],
                          chunk & (gridDim.x - 1)) =
        CombineWarps<kHeadDim>(outputs, shared.sums, g, chunk);
  }
  for (uint32_t r = threadIdx.x / kMaxGroup; r < gridDim.x; r += kThreads / kMaxGroup) {
    const uint32_t g = threadIdx.x % kMaxGroup;
    if (g < group) *team.map_shared_rank(&shared.received[rank][g], r) = shared.sums.block[g];
  }
  team.sync();
  ForReceived(shared, group, -INFINITY, [&](uint32_t g, float2 of_all, uint32_t r, float largest) {
    // Not `> 0`: a NaN must come out as NaN.
    const float inverse = of_all.y == 0.0f ? 0.0f : 1.0f / of_all.y;
    shared.factors[r][g] = largest == -INFINITY ? 0.0f : exp2f(largest - of_all.x) * inverse;
    if (r == 0 && rank == 0 && target.lse != nullptr) {
      target.lse[blockIdx.z * target.lse_batch_stride + kv_head * group + g] =
          of_all.y == 0.0f ? -INFINITY : (of_all.x + log2f(of_all.y)) / kLog2E;
    }
  });
  __syncthreads();
  const uint32_t g = threadIdx.x % kMaxGroup;
  if (g >= group) return;
  float* const out =
      target.out + blockIdx.z * target.batch_stride + (kv_head * group + g) * target.head_stride;
  for (uint32_t own = threadIdx.x / kMaxGroup; own < own_chunks; own += kThreads / kMaxGroup) {
    const uint32_t chunk = own * gridDim.x + rank;
    if (chunk >= kChunks) break;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (uint32_t r = 0; r < gridDim.x; ++r) {
      AddScaled(value, shared.factors[r][g], partials[(r * group + g) * own_chunks + own]);
    }
    out[4 * chunk] = value.x;
    out[4 * chunk + 1] = value.y;
    out[4 * chunk + 2] = value.z;
    out[4 * chunk + 3] = value.w;
  }
}

#else

template <typename Storage, int kHeadDim>
__global__ void DecodeLayerKernel(const BatchTable*, uint32_t, QueryLaunch, uint32_t, uint32_t,
                                  OutputLaunch, LayerBytes, uint32_t*) {}

#endif

// As many blocks as surely fit the device at once, with so many resident on a multiprocessor: those
// that a team may lie on are not always a multiple of its size.
uint32_t TeamSize(const BatchShape& shape, uint32_t resident) {
  const uint32_t room = resident * static_cast<uint32_t>(shape.multiprocessors);
  const uint32_t heads = shape.kv_heads * shape.count;
  uint32_t blocks = kMostBlocks;
  if (heads * blocks > room / 4 * 3) blocks = 8;
  while (blocks > 2 && heads * blocks > room / 8 * 7) blocks /= 2;
  return heads * blocks > room ? 1 : blocks;
}

template <typename Storage, int kHeadDim>
cudaError_t Launch(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                   uint32_t budget, const OutputLaunch& target, uint32_t clusters,
                   cudaStream_t stream) {
  constexpr auto kTiles = static_cast<uint32_t>(kWarps * sizeof(Tile<kHeadDim>));
  const uint32_t chosen = 8 * ChosenRoom(budget);
  uint32_t resident = kResident<kHeadDim>, blocks = 0, wanted = 0;
  const auto plan = [&] {
    blocks = TeamSize(shape, resident);
    const uint32_t share = (clusters + blocks - 1) / blocks;
    wanted = std::max(kTiles, chosen + 12 * clusters + 4 * shape.group * share);
  };
  plan();
  uint32_t most = std::max(kMostArea, kTiles);
  if (wanted > most) {
    // Very many clusters: rather half the blocks than a choice in device memory.
    resident = 1;
    plan();
    most = std::max(kMostAreaAlone, kTiles);
  }
  LayerBytes bytes;
  bytes.list = RoundUp(sizeof(LayerShared<kHeadDim>));
  bytes.partials = RoundUp(bytes.list + 4 * budget);
  bytes.area = RoundUp(bytes.partials + 16 * blocks * shape.group * OwnChunks(kHeadDim, blocks));
  bytes.total = std::min(kMostShared, bytes.area + std::max(chosen, std::min(wanted, most)));
  const auto kernel = DecodeLayerKernel<Storage, kHeadDim>;
  const cudaError_t sized = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes.total));
  if (sized != cudaSuccess) return sized;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(blocks, shape.kv_heads, shape.count);
  return LaunchOverlapped(shape.overlap, blocks, kernel, grid, kThreads, bytes.total, stream,
                          shape.table, layer, queries, shape.group, budget, target, bytes,
                          shape.fault);
}

template <typename Storage>
cudaError_t LaunchFor(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                      uint32_t budget, const OutputLaunch& target, uint32_t clusters,
                      cudaStream_t stream) {
  switch (shape.head_dim) {
    case 64:
      return Launch<Storage, 64>(shape, layer, queries, budget, target, clusters, stream);
    case 96:
      return Launch<Storage, 96>(shape, layer, queries, budget, target, clusters, stream);
    case 128:
      return Launch<Storage, 128>(shape, layer, queries, budget, target, clusters, stream);
    case 256:
      return Launch<Storage, 256>(shape, layer, queries, budget, target, clusters, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LaunchDecodeLayer(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                              uint32_t budget_tokens, const OutputLaunch& target, uint32_t clusters,
                              cudaStream_t stream) {
  return shape.bf16
             ? LaunchFor<Bf16>(shape, layer, queries, budget_tokens, target, clusters, stream)
             : LaunchFor<Fp16>(shape, layer, queries, budget_tokens, target, clusters, stream);
}

}  // namespace clusterkv::gpu::cuda
