// Fetch: the cluster cache of one (layer, KV head), by one block.
//
//   selected ─► resident? ─yes─► touched          slots of the first `take` rows of each
//                  └─no──► slots (free, else those ──────────────────────────────────────► table
//                          of the least worth) ─► rows gathered from the host store
//
// Without misses: a few dependent reads of L2, a handful of barriers. Misses cost the way over
// PCIe: runs of their rows come by bulk copies into shared memory and go on to their slots
// (fetch_gather.cuh), up to 64 KiB in flight for each block (design D5); slots are noted in the
// state meanwhile. What is chosen, touched and evicted is what the host backend would; which free
// slot a row gets is not determined, and shows nowhere.
#include "gpu/cuda/kernels/block_sums.cuh"
#include "gpu/cuda/kernels/cluster_cache.cuh"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/fetch_gather.cuh"
#include "gpu/cuda/kernels/numeric.cuh"
#include "gpu/cuda/kernels/overlapped_launch.cuh"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kInShared = kCopiedSlots / 2;  // clusters whose keys and sizes fit shared memory
constexpr uint32_t kHit = ~0u;                    // in miss_of

struct FetchShared {
  SharedSlot slot;
  uint32_t hits, hit_tokens, misses, missed_tokens;
  bool damaged;
  BlockSums<kThreads, 4> sums;
  // Of kThreads selected clusters at a time: where each one's attended rows, the first ones, begin
  // among all of these.
  uint32_t table_begin[kThreads];
  uint32_t first_row[kThreads];
  uint32_t miss_of[kThreads];  // which miss a cluster is
  GatherShared<kThreads> gather;
  EvictShared<kThreads> evict;
  uint32_t room[kCopiedSlots];  // keys and sizes while evicting, then the first free slots
};

__global__ void __launch_bounds__(kThreads)
    FetchKernel(const BatchTable* table, uint32_t layer, uint32_t* fault) {
  FollowPredecessor();
  extern __shared__ __align__(128) std::byte dynamic_shared[];
  std::byte* const buffers = dynamic_shared;
  auto& shared = *reinterpret_cast<FetchShared*>(dynamic_shared + kCopyBytes);
  if (EnterSlot(table, blockIdx.y, shared.slot) != Entry::kCurrent) return;
  const DeviceSlot* const slot = &shared.slot.slot;
  const DeviceState state(*slot);
  const StateBlock& block = state.block();
  const uint32_t kv_head = blockIdx.x;
  const size_t head = HeadIndex(block, layer, kv_head);
  const size_t item = size_t{blockIdx.y} * gridDim.x + kv_head;
  const uint32_t clusters =
      min(state.VisibleClusters(head, shared.slot.latch.segments), table->scratch.clusters);
  const uint32_t step = shared.slot.latch.step;
  const uint32_t count = min(state.selected_count(kv_head), block.budget_tokens);
  const uint32_t* const selected = state.selected_cluster(kv_head);
  const uint32_t* const take = state.selected_take(kv_head);
  // The thread's first one, before it is known whether there are so many.
  uint32_t cluster = 0, attended = 0;
  if (threadIdx.x < block.budget_tokens) {
    cluster = selected[threadIdx.x];
    attended = take[threadIdx.x];
  }
  const uint2 chunks_of = table->scratch.chunk_steps[blockIdx.y];
  if (threadIdx.x == 0) {
    shared.hits = shared.hit_tokens = shared.misses = shared.missed_tokens = 0;
    shared.damaged = shared.gather.damaged = shared.evict.damaged = false;
    shared.evict.freed = state.free_count(head);
  }
  PrepareGather(shared.gather);
  __syncthreads();

  // What a thread looked up stays in its registers where each looks up one cluster.
  const ClusterEntry* const entries = state.clusters(head);
  uint32_t* const last_used = state.last_used(head);
  ClusterEntry entry{};
  bool missed = false;
  const auto look_up = [&] {
    if (cluster >= clusters) return false;
    entry = entries[cluster];
    missed = last_used[cluster] == 0;
    return true;
  };

  // Hits first: what this step uses must not make room for its misses.
  uint32_t hits = 0, hit_tokens = 0, misses = 0, missed_tokens = 0;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    if (i >= kThreads) cluster = selected[i];
    if (!look_up()) {
      shared.damaged = true;
      continue;
    }
    const uint32_t tokens = state.ClusterTokens(entry);
    if (!missed) {
      last_used[cluster] = step;
      ++hits, hit_tokens += tokens;
    } else {
      ++misses, missed_tokens += tokens;
    }
  }
  if (hits > 0) atomicAdd(&shared.hits, hits), atomicAdd(&shared.hit_tokens, hit_tokens);
  if (misses > 0)
    atomicAdd(&shared.misses, misses), atomicAdd(&shared.missed_tokens, missed_tokens);
  __syncthreads();
  const uint32_t needed = shared.missed_tokens;
  if (shared.damaged || shared.evict.freed > block.cache_tokens || needed > block.cache_tokens) {
    if (threadIdx.x == 0) {
      state.slot_count(kv_head) = 0;
      Report(fault, KernelFault::kDamagedState, layer);
    }
    return;
  }
  if (needed > shared.evict.freed) {
    // Select is done with the first query head's scores; what the estimate needs stays.
    const DecodeScratch& scratch = table->scratch;
    const bool in_shared = clusters <= kInShared;
    auto* const keys =
        in_shared ? shared.room
                  : reinterpret_cast<uint32_t*>(scratch.scores + item * scratch.score_stride);
    Evict<kThreads>(state, head, clusters, needed - shared.evict.freed, step, keys,
                    in_shared ? shared.room + kInShared : keys + scratch.clusters,
                    scratch.chosen + item * scratch.chosen_stride, shared.evict);
    if (shared.evict.damaged || shared.evict.freed < needed) {
      if (threadIdx.x == 0) {
        state.slot_count(kv_head) = 0;
        Report(fault, KernelFault::kDamagedState, layer);
      }
      return;
    }
  }
  const uint32_t free = shared.evict.freed;
  const FreeSlots slots = {.stack = state.free_slots(head) + free - 1, .copied = shared.room};
  for (uint32_t row = threadIdx.x; row < min(needed, kCopiedSlots); row += kThreads) {
    CopyAsync4(&shared.room[row], slots.stack - row);
  }
  CommitCopies();

  // Where each cluster's rows begin in the table, and each miss's slots on the stack.
  uint32_t* const slot_table = state.slot_table(kv_head);
  const auto piece_rows = kPieceBytes / static_cast<uint32_t>(state.row_bytes());
  uint32_t table_begin = 0, missed_begin = 0;
  for (uint32_t begin = 0; begin < count; begin += kThreads) {
    const uint32_t i = begin + threadIdx.x;
    if (count > kThreads && i < count) {
      cluster = selected[i];
      attended = take[i];
      look_up();
    }
    if (i >= count) missed = false;
    const uint32_t tokens = i < count ? state.ClusterTokens(entry) : 0;
    const uint32_t used = min(min(attended, tokens), block.budget_tokens);
    uint32_t totals[4], before[4] = {used, missed ? tokens : 0, missed ? 1u : 0u,
                                     missed ? (tokens + piece_rows - 1) / piece_rows : 0};
    ExclusiveSums(before, totals, shared.sums);
    shared.table_begin[threadIdx.x] = before[0];
    shared.first_row[threadIdx.x] = entry.first_row;
    shared.miss_of[threadIdx.x] = missed ? before[2] : kHit;
    // Looked up again, hits of a damaged state (step 0) are misses: no slots were set aside for
    // those.
    if (missed_begin + totals[1] > needed) {
      if (threadIdx.x == 0) shared.damaged = true;
    } else if (missed) {
      const std::byte* const chunk =
          FindChunk(*slot, shared.slot.latch, table->scratch, blockIdx.y, chunks_of, entry.chunk);
      if (chunk == nullptr) {
        Report(fault, KernelFault::kChunkNotMapped, entry.chunk);
        shared.damaged = true;
      }
      const uint32_t miss = before[2];
      shared.gather.miss_begin[miss] = before[1];
      shared.gather.miss_piece[miss] = before[3];
      shared.gather.miss_first_row[miss] = entry.first_row;
      shared.gather.miss_source[miss] = chunk + size_t{16} * entry.chunk_offset;
    }
    WaitCopies<0>();
    __syncthreads();
    if (shared.damaged) break;
    const MissedRows rows = {
        .misses = totals[2], .rows = totals[1], .pieces = totals[3], .before = missed_begin};
    Gather gather(state, head, rows, slots, buffers, shared.gather);
    gather.Start();
    AssignSlots(state, head, rows, slots, shared.gather);
    const uint32_t listed = min(kThreads, count - begin);
    const uint32_t room = block.budget_tokens - min(table_begin, block.budget_tokens);
#pragma unroll 4
    for (uint32_t row = threadIdx.x; row < min(totals[0], room); row += kThreads) {
      const uint32_t j = FindRun(shared.table_begin, listed, row);
      const uint32_t offset = row - shared.table_begin[j], miss = shared.miss_of[j];
      const uint32_t cache_slot =
          miss == kHit ? state.slot_of_row(head)[shared.first_row[j] + offset]
                       : slots(missed_begin + shared.gather.miss_begin[miss] + offset);
      if (cache_slot >= block.cache_tokens) shared.gather.damaged = true;
      slot_table[table_begin + row] = cache_slot;
    }
    gather.Finish();
    __syncthreads();
    if (shared.gather.damaged) break;
    if (missed) last_used[cluster] = step;
    table_begin += totals[0];
    missed_begin += totals[1];
  }
  if (threadIdx.x != 0) return;
  if (shared.damaged || shared.gather.damaged) {
    state.free_count(head) = free - missed_begin;
    state.slot_count(kv_head) = 0;
    Report(fault, KernelFault::kDamagedState, layer);
    return;
  }
  state.free_count(head) = free - needed;
  state.slot_count(kv_head) = min(table_begin, block.budget_tokens);
  LayerCounters& counters = state.counters(layer);
  const auto add = [](uint64_t& counter, uint64_t amount) {
    if (amount > 0) atomicAdd(reinterpret_cast<unsigned long long*>(&counter), amount);
  };
  add(counters.hit_clusters, shared.hits);
  add(counters.missed_clusters, shared.misses);
  add(counters.hit_tokens, shared.hit_tokens);
  add(counters.missed_tokens, needed);
  add(counters.gathered_bytes, needed * state.row_bytes());
}

}  // namespace

cudaError_t LaunchFetch(const BatchShape& shape, uint32_t layer, cudaStream_t stream) {
  const dim3 grid(shape.kv_heads, shape.count);
  constexpr int kBytes = kCopyBytes + sizeof(FetchShared);
  const cudaError_t sized =
      cudaFuncSetAttribute(FetchKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (sized != cudaSuccess) return sized;
  return LaunchOverlapped(shape.overlap, FetchKernel, grid, kThreads, kBytes, stream, shape.table,
                          layer, shape.fault);
}

}  // namespace clusterkv::gpu::cuda
