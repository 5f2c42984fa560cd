// Attend: exact softmax attention of one new token's query heads over sinks + slot table + window
// (and the estimate of what was not selected: RetroInfer, see host/host_attend.cc).
//
//   blocks (split, KV head, slot):  tiles of 16 rows, each warp its own ─► partials
//   the last block of a head:       partials ─► output, log-sum-exp
//
// Split-K flash decoding; attend_tile.cuh has the inner loop. There are about as many blocks as fit
// the device at once, so that each runs through its rows without a pause. Cost: the rows' bytes at
// HBM's rate; at batch 1 latency.
#include <algorithm>
#include <cfloat>

#include "gpu/cuda/kernels/attend_tile.cuh"
#include "gpu/cuda/kernels/attended_rows.cuh"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/overlapped_launch.cuh"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kWarps = 4;
constexpr uint32_t kThreads = 32 * kWarps;
static_assert(kRowsPerPart == kTileRows * kWarps);

template <int kHeadDim>
constexpr uint32_t kResident = kHeadDim <= 128 ? 4 : 2;  // blocks of a multiprocessor

constexpr uint32_t kMostParts = 192;  // whose factors fit shared memory

template <int kHeadDim>
struct AttendShared {
  Tile<kHeadDim> tiles[kWarps];
  TileRows<kHeadDim> queries;
  WarpSums<kWarps> sums;
  bool last;
  SharedSlot slot;
};

// Rows of the slot's head, in the order sinks, slot table, window, estimated clusters.
struct RowPlan {
  uint32_t sinks, slots;
  WindowRows window;
  uint32_t estimates;
  __device__ uint32_t rows() const { return sinks + slots + window.count + estimates; }
};

__device__ RowPlan PlanRows(const DeviceState& state, const StepLatch& latch, size_t head,
                            uint32_t slot_count, uint32_t most_estimates) {
  const StateBlock& block = state.block();
  RowPlan plan;
  plan.sinks = min(block.sink_tokens, latch.length);
  plan.slots = min(slot_count, block.budget_tokens);
  plan.window = FindWindow(block, latch);
  plan.estimates =
      block.estimate != 0 ? min(state.VisibleClusters(head, latch.segments), most_estimates) : 0;
  return plan;
}

// Where row `index` lies and what is added to its logit.
__device__ TileRow PlaceRow(const DeviceState& state, const RowPlan& plan, size_t head,
                            uint32_t kv_head, const uint32_t* taken, uint32_t index) {
  if (index < plan.sinks) return ExactRow(state, state.sink(head, index));
  if ((index -= plan.sinks) < plan.slots) {
    const uint32_t slot = state.slot_table(kv_head)[index];
    return slot < state.block().cache_tokens ? ExactRow(state, state.cache(head, slot)) : TileRow();
  }
  if ((index -= plan.slots) < plan.window.count) {
    return ExactRow(state, state.window(head, plan.window.begin + index));
  }
  if ((index -= plan.window.count) < plan.estimates) {
    return EstimateRow(state, head, index, taken);
  }
  return {};
}

// All parts of a head: the output and its log-sum-exp. `factors`: [kMostParts + 2][group], shared.
template <int kHeadDim>
__device__ void Combine(const float* partials, const float2* partial_sums, uint32_t parts,
                        uint32_t group, float* factors, const OutputLaunch& target, uint32_t slot,
                        uint32_t kv_head) {
  float* const largest = factors + kMostParts * group;
  float* const inverses = largest + group;
  // A warp for each query head: what its parts weigh.
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t g = threadIdx.x / 32; g < group; g += kWarps) {
    float most = -INFINITY;
    for (uint32_t p = lane; p < parts; p += 32) most = fmaxf(most, partial_sums[p * group + g].x);
    for (uint32_t step = 16; step > 0; step /= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    }
    float sum = 0.0f;
    for (uint32_t p = lane; p < parts; p += 32) {
      const float2 own = partial_sums[p * group + g];
      if (own.x != -INFINITY) sum += exp2f(own.x - most) * own.y;
    }
    for (uint32_t step = 16; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    // Not `> 0`: a NaN must come out as NaN.
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (uint32_t p = lane; p < min(parts, kMostParts); p += 32) {
      const float own = partial_sums[p * group + g].x;
      factors[p * group + g] = own == -INFINITY ? 0.0f : exp2f(own - most) * inverse;
    }
    if (lane != 0) continue;
    largest[g] = most;
    inverses[g] = inverse;
    if (target.lse != nullptr) {
      target.lse[slot * target.lse_batch_stride + kv_head * group + g] =
          sum == 0.0f ? -INFINITY : (most + log2f(sum)) / kLog2E;
    }
  }
  __syncthreads();
  const size_t stride = size_t{group} * kHeadDim;
  for (uint32_t i = 4 * threadIdx.x; i < group * kHeadDim; i += 4 * kThreads) {
    const uint32_t g = i / kHeadDim;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (uint32_t p = 0; p < parts; ++p) {
      const float4 own = *reinterpret_cast<const float4*>(partials + p * stride + i);
      float factor = 0.0f;
      if (p < kMostParts) {
        factor = factors[p * group + g];
      } else if (const float most = partial_sums[p * group + g].x; most != -INFINITY) {
        factor = exp2f(most - largest[g]) * inverses[g];
      }
      AddScaled(value, factor, own);
    }
    float* const out = target.out + slot * target.batch_stride +
                       (kv_head * group + g) * target.head_stride + i % kHeadDim;
    out[0] = value.x;
    out[1] = value.y;
    out[2] = value.z;
    out[3] = value.w;
  }
}

template <typename Storage, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kResident<kHeadDim>)
    AttendKernel(const BatchTable* table, uint32_t layer, QueryLaunch queries, uint32_t group,
                 OutputLaunch target) {
  FollowPredecessor();
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<AttendShared<kHeadDim>*>(shared_bytes);
  const uint32_t kv_head = blockIdx.y;
  const Entry entry = EnterSlot(table, blockIdx.z, shared.slot);
  if (entry == Entry::kSkip) return;
  // Once the tiles are read, their place holds the warps' outputs, then the factors of the parts.
  auto* const outputs = reinterpret_cast<float*>(shared.tiles);
  static_assert(sizeof(shared.tiles) >= kWarps * 16 * kHeadDim * sizeof(float));
  static_assert(sizeof(shared.tiles) >= (kMostParts + 2) * kMaxGroup * sizeof(float));
  const auto combine = [&](const float* partials, const float2* partial_sums, uint32_t parts) {
    Combine<kHeadDim>(partials, partial_sums, parts, group, outputs, target, blockIdx.z, kv_head);
  };
  if (entry == Entry::kStale) {
    if (blockIdx.x == 0) combine(nullptr, nullptr, 0);
    return;
  }
  const DeviceState state(shared.slot.slot);
  const size_t head = HeadIndex(state.block(), layer, kv_head);
  const size_t item = size_t{blockIdx.z} * gridDim.y + kv_head;
  const DecodeScratch& scratch = table->scratch;
  const RowPlan plan =
      PlanRows(state, shared.slot.latch, head, state.slot_count(kv_head), scratch.clusters);
  const uint32_t tiles = (plan.rows() + kTileRows - 1) / kTileRows;
  const uint32_t parts = min((tiles + kWarps - 1) / kWarps, min(gridDim.x, scratch.parts));
  if (parts == 0) {
    if (blockIdx.x == 0) combine(nullptr, nullptr, 0);
    return;
  }
  if (blockIdx.x >= parts) return;
  StartGroupQueries<kHeadDim, kThreads>(queries, blockIdx.z, kv_head, group, shared.queries);
  WaitCopies<0>();
  __syncthreads();
  const uint32_t* const taken = scratch.taken + item * scratch.clusters;
  WarpAttention<Storage, kHeadDim> attention;
  attention.Attend(
      TileRun{blockIdx.x + threadIdx.x / 32 * parts, kWarps * parts, tiles},
      [&](uint32_t index) { return PlaceRow(state, plan, head, kv_head, taken, index); },
      shared.queries, state.block().softmax_scale * kLog2E,
      reinterpret_cast<const std::byte*>(&state.header()), shared.tiles[threadIdx.x / 32]);
  ShareOutputs(attention, group, outputs, shared.sums);
  float* const partials = scratch.partials + item * scratch.parts * group * kHeadDim;
  float2* const partial_sums = scratch.partial_sums + item * scratch.parts * group;
  for (uint32_t i = threadIdx.x; i < group * kHeadDim / 4; i += kThreads) {
    *reinterpret_cast<float4*>(&partials[size_t{blockIdx.x} * group * kHeadDim + 4 * i]) =
        CombineWarps<kHeadDim>(outputs, shared.sums, i / (kHeadDim / 4), i % (kHeadDim / 4));
  }
  if (threadIdx.x < group) {
    partial_sums[blockIdx.x * group + threadIdx.x] = shared.sums.block[threadIdx.x];
  }
  if (parts > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t ticket = atomicAdd(&scratch.attend_tickets[item], 1u);
      shared.last = ticket + 1 == parts;
      if (shared.last) scratch.attend_tickets[item] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!shared.last) return;
  } else {
    __threadfence_block();
    __syncthreads();
  }
  combine(partials, partial_sums, parts);
}

template <typename Storage, int kHeadDim>
cudaError_t Launch(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                   const OutputLaunch& target, uint32_t parts, cudaStream_t stream) {
  const auto kernel = AttendKernel<Storage, kHeadDim>;
  constexpr auto kBytes = static_cast<int>(sizeof(AttendShared<kHeadDim>));
  const cudaError_t sized =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (sized != cudaSuccess) return sized;
  // One wave of blocks; of many heads a few waves, so that no multiprocessor runs dry long before
  // the others.
  const uint32_t room = kResident<kHeadDim> * static_cast<uint32_t>(shape.multiprocessors);
  const uint32_t heads = shape.kv_heads * shape.count;
  const uint32_t wanted = 2 * heads > room ? (3 * room + heads - 1) / heads : room / heads;
  const uint32_t splits = std::clamp(wanted, 1u, std::max(1u, parts));
  const dim3 grid(splits, shape.kv_heads, shape.count);
  return LaunchOverlapped(shape.overlap, kernel, grid, kThreads, kBytes, stream, shape.table, layer,
                          queries, shape.group, target);
}

template <typename Storage>
cudaError_t LaunchFor(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                      const OutputLaunch& target, uint32_t parts, cudaStream_t stream) {
  switch (shape.head_dim) {
    case 64:
      return Launch<Storage, 64>(shape, layer, queries, target, parts, stream);
    case 96:
      return Launch<Storage, 96>(shape, layer, queries, target, parts, stream);
    case 128:
      return Launch<Storage, 128>(shape, layer, queries, target, parts, stream);
    case 256:
      return Launch<Storage, 256>(shape, layer, queries, target, parts, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LaunchAttend(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                         const OutputLaunch& target, uint32_t parts, cudaStream_t stream) {
  return shape.bf16 ? LaunchFor<Bf16>(shape, layer, queries, target, parts, stream)
                    : LaunchFor<Fp16>(shape, layer, queries, target, parts, stream);
}

}  // namespace clusterkv::gpu::cuda
