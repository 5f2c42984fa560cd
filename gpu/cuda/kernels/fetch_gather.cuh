// The gather of Fetch: rows of missed clusters, from the host store to their slots of the cache.
#pragma once

#include <cstdint>

#include "gpu/cuda/kernels/bulk_copy.cuh"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda {

// Threads of a block that copy, each with kBuffers of a piece. They lie apart in all warps: each
// waits for rows of its own and issues a copy for each, and lanes of a warp would take turns. Two
// blocks fit a multiprocessor, so that the next kernel is in place before this one ends.
constexpr uint32_t kCopyLanes = 8;
constexpr uint32_t kBuffers = 2;
constexpr uint32_t kPieceBytes = 4096;
constexpr uint32_t kCopyBytes = kCopyLanes * kBuffers * kPieceBytes;
[[maybe_unused]] constexpr uint32_t kInFlight =
    8;  // 16-byte loads of a lane, where there are no bulk copies
constexpr uint32_t kCopiedSlots = 4096;

// In shared memory. Of misses among the selected clusters, kThreads at a time: where each one's
// rows and pieces begin among all of these, its first row in the row space, and where it lies.
template <uint32_t kThreads>
struct GatherShared {
  uint32_t miss_begin[kThreads + 1];
  uint32_t miss_piece[kThreads];
  uint32_t miss_first_row[kThreads];
  const std::byte* miss_source[kThreads];
  bool damaged;  // false before; a slot leads outside the cache
  uint64_t barriers[kCopyLanes][kBuffers];
  uint32_t phases[kCopyLanes];  // a bit for each buffer: the phase that comes next
};

// The last begin that is not above `row`; begins[0] = 0.
__device__ inline uint32_t FindRun(const uint32_t* begins, uint32_t runs, uint32_t row) {
  uint32_t low = 0, high = runs;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (begins[middle] <= row ? low : high) = middle;
  }
  return low;
}

// The slots of missed rows, from the stack's top; the first kCopiedSlots in shared memory: while
// rows come over PCIe, a read of device memory can wait behind them for tens of microseconds.
struct FreeSlots {
  const uint32_t* stack;  // from the top down
  const uint32_t* copied;

  __device__ uint32_t operator()(uint32_t row) const {
    return row < kCopiedSlots ? copied[row] : stack[-static_cast<int64_t>(row)];
  }
};

// Missed rows of kThreads selected clusters, or fewer.
struct MissedRows {
  uint32_t misses, rows, pieces;
  uint32_t before;  // rows that earlier ones missed
};

// Notes the slots of missed rows. All threads.
template <uint32_t kThreads>
__device__ void AssignSlots(const DeviceState& state, size_t head, const MissedRows& missed,
                            const FreeSlots& slots, const GatherShared<kThreads>& shared) {
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
template <uint32_t kThreads>
class Gather {
 public:
  __device__ Gather(const DeviceState& state, size_t head, const MissedRows& missed,
                    const FreeSlots& slots, std::byte* buffers, GatherShared<kThreads>& shared)
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
            shared_.damaged = true;
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
  static constexpr uint32_t kCopyStride = kThreads / kCopyLanes;

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
  GatherShared<kThreads>& shared_;
  uint32_t rows_[kBuffers], first_row_[kBuffers];  // of the pieces in the buffers
};

template <uint32_t kThreads>
__device__ void PrepareGather(GatherShared<kThreads>& shared) {
  if (threadIdx.x >= kCopyLanes) return;
  for (uint64_t& barrier : shared.barriers[threadIdx.x]) InitBarrier(&barrier);
  shared.phases[threadIdx.x] = 0;
}

#else

// By all warps, through registers.
template <uint32_t kThreads>
class Gather {
 public:
  __device__ Gather(const DeviceState& state, size_t head, const MissedRows& missed,
                    const FreeSlots& slots, std::byte* /*buffers*/, GatherShared<kThreads>& shared)
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
          shared_.damaged = true;
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
  GatherShared<kThreads>& shared_;
};

template <uint32_t kThreads>
__device__ void PrepareGather(GatherShared<kThreads>& /*shared*/) {}

#endif

}  // namespace clusterkv::gpu::cuda
