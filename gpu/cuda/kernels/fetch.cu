// Fetch: the cluster cache of one (layer, KV head), by one block.
//
//   selected ─► resident? ─yes─► touched          slots of the first `take` rows of each
//                  └─no──► slots (free, else those ──────────────────────────────────────► table
//                          of the least worth) ─► rows gathered from the host store
//
// Without misses: a few dependent reads of L2, a handful of barriers. Misses cost the way over
// PCIe: runs of their rows come by bulk copies into shared memory and go on to their slots, up to
// 64 KiB in flight for each block (design D5); what is noted of slots is noted while the first of
// them are on their way. What is chosen, touched and evicted is what the host backend would; which
// free slot a row gets is not determined, and shows nowhere.
#include "gpu/cuda/kernels/block_sums.cuh"
#include "gpu/cuda/kernels/bulk_copy.cuh"
#include "gpu/cuda/kernels/cluster_cache.cuh"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/numeric.cuh"
#include "gpu/cuda/kernels/overlapped_launch.cuh"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kInShared = 2048;  // clusters whose keys and sizes fit shared memory
// Of the gather: threads that copy, each with kBuffers of a piece. They lie apart in all warps:
// each waits for rows of its own and issues a copy for each, and lanes of a warp would take turns.
// Two blocks fit a multiprocessor, so that the next kernel is in place before this one ends.
constexpr uint32_t kCopyLanes = 8;
[[maybe_unused]] constexpr uint32_t kCopyStride = kThreads / kCopyLanes;
constexpr uint32_t kBuffers = 2;
constexpr uint32_t kPieceBytes = 4096;
constexpr uint32_t kCopyBytes = kCopyLanes * kBuffers * kPieceBytes;
[[maybe_unused]] constexpr uint32_t kInFlight =
    8;  // 16-byte loads of a lane, where there are no bulk copies

struct FetchShared {
  SharedSlot slot;
  uint32_t hits, hit_tokens, misses, missed_tokens;
  bool damaged;    // of what was looked up
  bool misplaced;  // a slot leads outside the cache
  BlockSums<kThreads, 4> sums;
  // Of kThreads selected clusters at a time: where each one's attended rows, the first ones, begin
  // among all of these.
  uint32_t table_begin[kThreads];
  uint32_t first_row[kThreads];
  // The misses among them: where each one's rows and its pieces begin among all of these. And which
  // miss a cluster is.
  uint32_t miss_begin[kThreads + 1];
  uint32_t miss_piece[kThreads];
  uint32_t miss_first_row[kThreads];
  const std::byte* miss_source[kThreads];
  uint32_t miss_of[kThreads];
  EvictShared<kThreads> evict;
  uint64_t barriers[kCopyLanes][kBuffers];
  uint32_t phases[kCopyLanes];   // a bit for each buffer: the phase that comes next
  uint32_t room[2 * kInShared];  // keys and sizes while evicting, then the first free slots
};
constexpr uint32_t kHit = ~0u;  // in miss_of

// The last begin that is not above `row`; begins[0] = 0.
__device__ uint32_t FindRun(const uint32_t* begins, uint32_t runs, uint32_t row) {
  uint32_t low = 0, high = runs;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (begins[middle] <= row ? low : high) = middle;
  }
  return low;
}

// The slots of missed rows, from the stack's top; the first of all in shared memory: while rows
// come over PCIe, a read of device memory can wait behind them for tens of microseconds.
struct FreeSlots {
  const uint32_t* stack;  // from the top down
  const uint32_t* copied;

  __device__ uint32_t operator()(uint32_t row) const {
    return row < 2 * kInShared ? copied[row] : stack[-static_cast<int64_t>(row)];
  }
};

// Missed rows of kThreads selected clusters, or fewer.
struct MissedRows {
  uint32_t misses, rows, pieces;
  uint32_t before;  // rows that earlier ones missed
};

// Notes the slots of missed rows. All threads.
__device__ void AssignSlots(const DeviceState& state, size_t head, const MissedRows& missed,
                            const FreeSlots& slots, FetchShared& shared) {
  uint32_t* const slot_of_row = state.slot_of_row(head);
  for (uint32_t row = threadIdx.x; row < missed.rows; row += kThreads) {
    const uint32_t miss = FindRun(shared.miss_begin, missed.misses, row);
    slot_of_row[shared.miss_first_row[miss] + row - shared.miss_begin[miss]] =
        slots(missed.before + row);
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// K and V of the missed rows into their slots. A piece is up to kPieceBytes of one cluster's rows,
// which are contiguous in the host store and scatter over the cache. All threads make one, start
// it and finish it.
class Gather {
 public:
  __device__ Gather(const DeviceState& state, size_t head, const MissedRows& missed,
                    const FreeSlots& slots, std::byte* buffers, FetchShared& shared)
      : state_(state),
        head_(head),
        missed_(missed),
        slots_(slots),
        lane_(threadIdx.x / kCopyStride),
        pieces_(threadIdx.x % kCopyStride == 0 ? missed.pieces : 0),
        buffers_(buffers + lane_ * kBuffers * kPieceBytes),
        shared_(shared) {}

  // The first pieces are on their way.
  __device__ void Start() {
#pragma unroll
    for (uint32_t buffer = 0; buffer < kBuffers; ++buffer) {
      const uint32_t piece = lane_ + buffer * kCopyLanes;
      if (piece < pieces_) Load(piece, buffer);
    }
  }

  // Without a barrier at the end.
  __device__ void Finish() {
    const auto row_bytes = static_cast<uint32_t>(state_.row_bytes());
    for (uint32_t piece = lane_; piece < pieces_; piece += kBuffers * kCopyLanes) {
#pragma unroll
      for (uint32_t buffer = 0; buffer < kBuffers; ++buffer) {
        if (piece + buffer * kCopyLanes >= pieces_) break;
        Wait(buffer);
        for (uint32_t r = 0; r < rows_[buffer]; ++r) {
          const uint32_t slot = slots_(first_row_[buffer] + r);
          if (slot >= state_.block().cache_tokens) {
            shared_.misplaced = true;
            continue;
          }
          StartBulkStore(state_.cache(head_, slot), buffers_ + buffer * kPieceBytes + r * row_bytes,
                         row_bytes);
        }
        CommitBulkStores();
        const uint32_t next = piece + (kBuffers + buffer) * kCopyLanes;
        if (next >= pieces_) continue;
        WaitBulkReads();
        Load(next, buffer);
      }
    }
    WaitBulkStores();
  }

 private:
  __device__ void Load(uint32_t piece, uint32_t buffer) {
    const auto row_bytes = static_cast<uint32_t>(state_.row_bytes());
    const uint32_t piece_rows = kPieceBytes / row_bytes;
    const uint32_t miss = FindRun(shared_.miss_piece, missed_.misses, piece);
    const uint32_t begin = shared_.miss_begin[miss];
    const uint32_t end = miss + 1 < missed_.misses ? shared_.miss_begin[miss + 1] : missed_.rows;
    const uint32_t offset = (piece - shared_.miss_piece[miss]) * piece_rows;
    rows_[buffer] = min(piece_rows, end - begin - offset);
    first_row_[buffer] = missed_.before + begin + offset;
    StartBulkLoad(buffers_ + buffer * kPieceBytes,
                  shared_.miss_source[miss] + size_t{offset} * row_bytes, rows_[buffer] * row_bytes,
                  &shared_.barriers[lane_][buffer]);
  }

  __device__ void Wait(uint32_t buffer) {
    uint32_t& phases = shared_.phases[lane_];
    WaitBarrier(&shared_.barriers[lane_][buffer], phases >> buffer & 1);
    phases ^= 1u << buffer;
  }

  const DeviceState& state_;
  const size_t head_;
  const MissedRows& missed_;
  const FreeSlots& slots_;
  const uint32_t lane_;    // of those that copy
  const uint32_t pieces_;  // 0: this thread does not copy
  std::byte* const buffers_;
  FetchShared& shared_;
  uint32_t rows_[kBuffers], first_row_[kBuffers];  // of the pieces in the buffers
};

__device__ void PrepareGather(FetchShared& shared) {
  if (threadIdx.x >= kCopyLanes) return;
  for (uint64_t& barrier : shared.barriers[threadIdx.x]) InitBarrier(&barrier);
  shared.phases[threadIdx.x] = 0;
}

#else

// By all warps, through registers.
class Gather {
 public:
  __device__ Gather(const DeviceState& state, size_t head, const MissedRows& missed,
                    const FreeSlots& slots, std::byte* /*buffers*/, FetchShared& shared)
      : state_(state), head_(head), missed_(missed), slots_(slots), shared_(shared) {}

  __device__ void Start() {}
  __device__ void Finish() {
    const auto row_words = static_cast<uint32_t>(state_.row_bytes() / 16);
    const uint32_t words = missed_.rows * row_words;
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t begin = threadIdx.x / 32 * 32 * kInFlight; begin < words;
         begin += kThreads * kInFlight) {
      uint4 values[kInFlight];
#pragma unroll
      for (uint32_t i = 0; i < kInFlight; ++i) {
        const uint32_t word = begin + i * 32 + lane;
        if (word >= words) continue;
        const uint32_t row = word / row_words;
        const uint32_t miss = FindRun(shared_.miss_begin, missed_.misses, row);
        const std::byte* const source =
            shared_.miss_source[miss] + (row - shared_.miss_begin[miss]) * state_.row_bytes();
        values[i] = __ldcs(reinterpret_cast<const uint4*>(source) + word % row_words);
      }
#pragma unroll
      for (uint32_t i = 0; i < kInFlight; ++i) {
        const uint32_t word = begin + i * 32 + lane;
        if (word >= words) continue;
        const uint32_t slot = slots_(missed_.before + word / row_words);
        if (slot >= state_.block().cache_tokens) {
          shared_.misplaced = true;
          continue;
        }
        reinterpret_cast<uint4*>(state_.cache(head_, slot))[word % row_words] = values[i];
      }
    }
  }

 private:
  const DeviceState& state_;
  const size_t head_;
  const MissedRows& missed_;
  const FreeSlots& slots_;
  FetchShared& shared_;
};

__device__ void PrepareGather(FetchShared& /*shared*/) {}

#endif

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
    shared.damaged = shared.misplaced = shared.evict.damaged = false;
    shared.evict.freed = state.free_count(head);
  }
  PrepareGather(shared);
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
  for (uint32_t row = threadIdx.x; row < min(needed, 2 * kInShared); row += kThreads) {
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
      shared.miss_begin[miss] = before[1];
      shared.miss_piece[miss] = before[3];
      shared.miss_first_row[miss] = entry.first_row;
      shared.miss_source[miss] = chunk + size_t{16} * entry.chunk_offset;
    }
    WaitCopies<0>();
    __syncthreads();
    if (shared.damaged) break;
    const MissedRows rows = {
        .misses = totals[2], .rows = totals[1], .pieces = totals[3], .before = missed_begin};
    Gather gather(state, head, rows, slots, buffers, shared);
    gather.Start();
    AssignSlots(state, head, rows, slots, shared);
    const uint32_t listed = min(kThreads, count - begin);
    const uint32_t room = block.budget_tokens - min(table_begin, block.budget_tokens);
#pragma unroll 4
    for (uint32_t row = threadIdx.x; row < min(totals[0], room); row += kThreads) {
      const uint32_t j = FindRun(shared.table_begin, listed, row);
      const uint32_t offset = row - shared.table_begin[j], miss = shared.miss_of[j];
      const uint32_t cache_slot = miss == kHit
                                      ? state.slot_of_row(head)[shared.first_row[j] + offset]
                                      : slots(missed_begin + shared.miss_begin[miss] + offset);
      if (cache_slot >= block.cache_tokens) shared.misplaced = true;
      slot_table[table_begin + row] = cache_slot;
    }
    gather.Finish();
    __syncthreads();
    if (shared.misplaced) break;
    if (missed) last_used[cluster] = step;
    table_begin += totals[0];
    missed_begin += totals[1];
  }
  if (threadIdx.x != 0) return;
  if (shared.damaged || shared.misplaced) {
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
