// The first block of a team: which clusters a KV head attends to, and where their rows are.
// Compiled for sm_90 and later only.
#pragma once

#include "gpu/cuda/kernels/attended_rows.cuh"
#include "gpu/cuda/kernels/layer_team.cuh"
#include "gpu/cuda/kernels/weighted_prefix.cuh"

namespace clusterkv::gpu::cuda::layer {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

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
    const std::byte* const chunk = FindChunk(shared.slot.slot, shared.slot.latch, scratch,
                                             blockIdx.z, shared.chunks_of, entry.chunk);
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
    plan.resident = min(plan.listed, resident);
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

  // Those in device memory.
  __device__ uint32_t near_rows() const { return sinks + window.count + estimates + plan.resident; }
  __device__ uint32_t rows() const { return near_rows() + plan.listed - plan.resident + plan.rest; }
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

// Tiles of a warp, in turn: near ones, of rows in device memory, before those with missed rows. If
// there are such, the last warp of each block begins with them, so that the link is busy while the
// others attend to the near ones; these then join it.
//
// One warp a block, not more: beyond 1 to 2 MiB on their way over PCIe, all other reads of device
// memory wait until these are there; 256 KiB fill the link (tests/gpu/cuda/link_benchmark.cu).
struct LayerTiles {
  const RowFinder& rows;
  uint32_t index;
  bool joined;

  __device__ explicit LayerTiles(const RowFinder& rows)
      : rows(rows), index(blockIdx.x + warp() * gridDim.x), joined(true) {
    if (rows.near_rows() == rows.rows()) return;
    if (warp() == kWarps - 1) {
      index = near() + blockIdx.x;
    } else {
      joined = false;
      JoinAtEnd();
    }
  }

  __device__ bool more() const { return index * kTileRows < rows.rows(); }
  __device__ void Advance() {
    index += (joined ? kWarps : kWarps - 1) * gridDim.x;
    JoinAtEnd();
  }

 private:
  static __device__ uint32_t warp() { return threadIdx.x / 32; }
  __device__ uint32_t near() const { return rows.near_rows() / kTileRows; }
  // From the near tiles to the missed ones.
  __device__ void JoinAtEnd() {
    if (joined || index < near()) return;
    joined = true;
    index = near() + (1 + warp()) * gridDim.x + blockIdx.x;
  }
};

#endif

}  // namespace clusterkv::gpu::cuda::layer
