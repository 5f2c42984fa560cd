// Attend: exact softmax attention of one new token's query heads over sinks + slot table + window
// (and the estimate of what was not selected: RetroInfer, see host/host_attend.cc).
//
//   blocks (part, KV head, slot):  64 rows ─► scores, exponentials, weighted values ─► partials
//   the last block of a head:      partials ─► output, log-sum-exp
//
// Split-K flash decoding. A block reads its rows once, by asynchronous copies into swizzled shared
// memory; the query heads of the group are packed into the 16 rows of the tensor cores' product,
// and each warp takes 16 of the 64 keys. Weights are split in two halves of the storage type, so
// that the second product keeps fp32's accuracy. Cost: the rows' bytes at HBM's rate; at batch 1
// latency.
#include <cfloat>

#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/numeric.cuh"
#include "gpu/cuda/kernels/overlapped_launch.cuh"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kWarps = 4;
constexpr uint32_t kThreads = 32 * kWarps;
static_assert(kRowsPerPart == 16 * kWarps);
constexpr float kLog2E = 1.4426950408889634f;

constexpr uint32_t kMostParts = 192;  // whose factors fit shared memory

template <int kHeadDim>
struct AttendShared {
  // Rows of 16-byte chunks; chunk c of row r lies at c ^ (r & 7), so that eight rows' chunks of one
  // column lie in different banks.
  uint4 keys[kRowsPerPart][kHeadDim / 8];
  uint4 values[kRowsPerPart][kHeadDim / 8];
  uint4 queries[kMaxGroup][kHeadDim / 8];
  const std::byte* key_rows[kRowsPerPart];
  const std::byte* value_rows[kRowsPerPart];
  float biases[kRowsPerPart];  // added to the logit, in units of log2; -inf: no row
  float largest[kWarps][kMaxGroup], sums[kWarps][kMaxGroup];
  bool last;
  SharedSlot slot;
};

template <int kHeadDim>
__device__ uint32_t Swizzled(uint32_t row, uint32_t chunk) {
  // Of 96 elements the last four chunks can only trade places with each other.
  return chunk < kHeadDim / 64 * 8 ? chunk ^ (row & 7) : chunk ^ (row & 3);
}

// Rows of the slot's head, in the order sinks, slot table, window, estimated clusters.
struct RowPlan {
  uint32_t sinks, slots, window, estimates;
  uint32_t window_begin;
  __device__ uint32_t rows() const { return sinks + slots + window + estimates; }
};

__device__ RowPlan PlanRows(const DeviceState& state, const StepLatch& latch, size_t head,
                            uint32_t slot_count) {
  const StateBlock& block = state.block();
  const uint32_t length = latch.length;
  RowPlan plan;
  plan.sinks = min(block.sink_tokens, length);
  plan.slots = min(slot_count, block.budget_tokens);
  uint32_t begin = max(latch.cut, block.sink_tokens);
  // After an overflow only the newest are still there.
  if (length > begin) begin = max(begin, length - min(length, block.window_slots));
  plan.window_begin = begin;
  plan.window = length > begin ? length - begin : 0;
  plan.estimates = block.estimate != 0 ? state.VisibleClusters(head, latch.segments) : 0;
  return plan;
}

// Where row `index` lies and what is added to its logit.
__device__ void PlaceRow(const DeviceState& state, const RowPlan& plan, size_t head,
                         uint32_t kv_head, const uint32_t* taken, uint32_t index,
                         const std::byte*& key, const std::byte*& value, float& bias) {
  const size_t half = state.mean_bytes();
  key = nullptr;
  bias = 0.0f;
  if (index < plan.sinks) {
    key = state.sink(head, index);
  } else if ((index -= plan.sinks) < plan.slots) {
    const uint32_t slot = state.slot_table(kv_head)[index];
    if (slot < state.block().cache_tokens) key = state.cache(head, slot);
  } else if ((index -= plan.slots) < plan.window) {
    key = state.window(head, plan.window_begin + index);
  } else if ((index -= plan.window) < plan.estimates) {
    const uint32_t tokens = state.ClusterTokens(state.clusters(head)[index]);
    const uint32_t left = tokens - min(tokens, taken[index]);
    if (left == 0) {
      bias = -INFINITY;
      value = nullptr;
      return;
    }
    key = state.centroids(head) + index * half;
    value = state.value_means(head) + index * half;
    bias = log2f(static_cast<float>(left));
    return;
  }
  value = key + half;
  if (key == nullptr) {
    value = nullptr;
    bias = -INFINITY;
  }
}

template <int kHeadDim>
__device__ void LoadRows(const DeviceState& state, AttendShared<kHeadDim>& shared) {
  constexpr uint32_t kChunks = kHeadDim / 8;
  // Of a row that is not there zeros: a weight of 0 times garbage could be NaN.
  const std::byte* const nowhere = reinterpret_cast<const std::byte*>(&state.header());
  for (uint32_t i = threadIdx.x; i < kRowsPerPart * kChunks; i += kThreads) {
    const uint32_t row = i / kChunks, chunk = i % kChunks;
    const std::byte* const from = shared.key_rows[row];
    CopyAsync16(&shared.keys[row][Swizzled<kHeadDim>(row, chunk)],
                from == nullptr ? nowhere : from + 16 * chunk, from != nullptr);
  }
  CommitCopies();
  for (uint32_t i = threadIdx.x; i < kRowsPerPart * kChunks; i += kThreads) {
    const uint32_t row = i / kChunks, chunk = i % kChunks;
    const std::byte* const from = shared.value_rows[row];
    CopyAsync16(&shared.values[row][Swizzled<kHeadDim>(row, chunk)],
                from == nullptr ? nowhere : from + 16 * chunk, from != nullptr);
  }
  CommitCopies();
}

// The group's query heads, zeros up to 16.
template <int kHeadDim>
__device__ void LoadQueries(const QueryLaunch& queries, uint32_t slot, uint32_t kv_head,
                            uint32_t group, AttendShared<kHeadDim>& shared) {
  for (uint32_t i = threadIdx.x; i < kMaxGroup * kHeadDim / 2; i += kThreads) {
    const uint32_t head = i / (kHeadDim / 2), pair = i % (kHeadDim / 2);
    uint32_t bits = 0;
    if (head < group) {
      const auto* const halves = reinterpret_cast<const uint16_t*>(
          queries.q + slot * queries.batch_stride + (kv_head * group + head) * queries.head_stride +
          pair * 4);
      bits = halves[0] | uint32_t{halves[1]} << 16;
    }
    auto* const words =
        reinterpret_cast<uint32_t*>(&shared.queries[head][Swizzled<kHeadDim>(head, pair / 4)]);
    words[pair % 4] = bits;
  }
}

// This warp's 16 keys against the queries: logits in units of log2. Thread t holds query rows t / 4
// and t / 4 + 8, keys 2 (t % 4), + 1, + 8, + 9 of the warp's.
template <typename Storage, int kHeadDim>
__device__ void Logits(const AttendShared<kHeadDim>& shared, float scale, float (&logits)[2][4]) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t first = threadIdx.x / 32 * 16;
#pragma unroll
  for (uint32_t step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4], b[4];
    const uint32_t query_row = lane % 16;
    LoadMatrix4(a, &shared.queries[query_row][Swizzled<kHeadDim>(query_row, 2 * step + lane / 16)]);
    // Tiles: keys 0-7 and 8-15, of each both halves of the 16 elements.
    const uint32_t key_row = first + lane % 8 + (lane / 16) * 8;
    LoadMatrix4(b, &shared.keys[key_row][Swizzled<kHeadDim>(key_row, 2 * step + lane / 8 % 2)]);
    Storage::Mma(logits[0], a, b[0], b[1]);
    Storage::Mma(logits[1], a, b[2], b[3]);
  }
  const uint32_t key = first + lane % 4 * 2;
#pragma unroll
  for (uint32_t tile = 0; tile < 2; ++tile) {
    const float low = shared.biases[key + 8 * tile], high = shared.biases[key + 8 * tile + 1];
    // Not a product with -inf: of a row that is not there nothing must remain, not even NaN.
    logits[tile][0] = low == -INFINITY ? -INFINITY : logits[tile][0] * scale + low;
    logits[tile][1] = high == -INFINITY ? -INFINITY : logits[tile][1] * scale + high;
    logits[tile][2] = low == -INFINITY ? -INFINITY : logits[tile][2] * scale + low;
    logits[tile][3] = high == -INFINITY ? -INFINITY : logits[tile][3] * scale + high;
  }
}

// Largest logit and sum of exponentials of the two query rows of this thread; logits become
// weights.
__device__ void Exponentials(float (&logits)[2][4], float (&largest)[2], float (&sums)[2]) {
#pragma unroll
  for (uint32_t row = 0; row < 2; ++row) {
    float most = fmaxf(fmaxf(logits[0][2 * row], logits[0][2 * row + 1]),
                       fmaxf(logits[1][2 * row], logits[1][2 * row + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    largest[row] = most;
    const float base = most == -INFINITY ? 0.0f : most;
    float sum = 0.0f;
#pragma unroll
    for (uint32_t tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        float& weight = logits[tile][2 * row + i];
        weight = exp2f(weight - base);
        sum += weight;
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sums[row] = sum;
  }
}

// Weights times values: output[n] holds elements 8 n + 2 (t % 4), + 1 of query rows t / 4, + 8.
template <typename Storage, int kHeadDim>
__device__ void WeighValues(const AttendShared<kHeadDim>& shared, const float (&weights)[2][4],
                            float (&output)[kHeadDim / 8][4]) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t first = threadIdx.x / 32 * 16;
  uint32_t high[4], low[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const float x = weights[i / 2][i % 2 * 2], y = weights[i / 2][i % 2 * 2 + 1];
    high[i] = Storage::FromFloat2(x, y);
    const float2 kept = Storage::ToFloat2(high[i]);
    low[i] = Storage::FromFloat2(x - kept.x, y - kept.y);
  }
#pragma unroll
  for (uint32_t pair = 0; pair < kHeadDim / 16; ++pair) {
    uint32_t b[4];
    const uint32_t row = first + lane % 16;
    LoadMatrix4Transposed(b, &shared.values[row][Swizzled<kHeadDim>(row, 2 * pair + lane / 16)]);
    Storage::Mma(output[2 * pair], high, b[0], b[1]);
    Storage::Mma(output[2 * pair], low, b[0], b[1]);
    Storage::Mma(output[2 * pair + 1], high, b[2], b[3]);
    Storage::Mma(output[2 * pair + 1], low, b[2], b[3]);
  }
}

// The four warps' outputs become the block's.
template <int kHeadDim>
__device__ void WritePartial(AttendShared<kHeadDim>& shared, const float (&output)[kHeadDim / 8][4],
                             const float (&largest)[2], const float (&sums)[2], uint32_t group,
                             float* partial, float2* partial_sums) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane % 4 == 0) {
    for (uint32_t row = 0; row < 2; ++row) {
      shared.largest[warp][lane / 4 + 8 * row] = largest[row];
      shared.sums[warp][lane / 4 + 8 * row] = sums[row];
    }
  }
  // Keys and values are read; their place holds [warp][16][head_dim] floats.
  __syncthreads();
  auto* const outputs = reinterpret_cast<float*>(shared.keys);
  static_assert(sizeof(shared.keys) + sizeof(shared.values) >= kWarps * 16 * kHeadDim * 4);
#pragma unroll
  for (uint32_t n = 0; n < kHeadDim / 8; ++n) {
    for (uint32_t row = 0; row < 2; ++row) {
      const uint32_t g = lane / 4 + 8 * row;
      if (g >= group) continue;
      *reinterpret_cast<float2*>(&outputs[(warp * 16 + g) * kHeadDim + 8 * n + lane % 4 * 2]) =
          make_float2(output[n][2 * row], output[n][2 * row + 1]);
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < group * kHeadDim; i += kThreads) {
    const uint32_t g = i / kHeadDim;
    float most = -INFINITY;
    for (uint32_t w = 0; w < kWarps; ++w) most = fmaxf(most, shared.largest[w][g]);
    float sum = 0.0f, value = 0.0f;
    for (uint32_t w = 0; w < kWarps; ++w) {
      if (shared.largest[w][g] == -INFINITY) continue;
      const float factor = exp2f(shared.largest[w][g] - most);
      sum += factor * shared.sums[w][g];
      value += factor * outputs[(w * 16 + g) * kHeadDim + i % kHeadDim];
    }
    partial[i] = value;
    if (i % kHeadDim == 0) partial_sums[g] = make_float2(most, sum);
  }
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
      value.x += factor * own.x;
      value.y += factor * own.y;
      value.z += factor * own.z;
      value.w += factor * own.w;
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
__global__ void __launch_bounds__(kThreads)
    AttendKernel(const BatchTable* table, uint32_t layer, QueryLaunch queries, uint32_t group,
                 OutputLaunch target) {
  FollowPredecessor();
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<AttendShared<kHeadDim>*>(shared_bytes);
  const uint32_t kv_head = blockIdx.y;
  const Entry entry = EnterSlot(table, blockIdx.z, shared.slot);
  if (entry == Entry::kSkip) return;
  // Once keys and values are read, their place holds the factors of the parts.
  auto* const factors = reinterpret_cast<float*>(shared.keys);
  static_assert(sizeof(shared.keys) + sizeof(shared.values) >=
                (kMostParts + 2) * kMaxGroup * sizeof(float));
  const auto combine = [&](const float* partials, const float2* partial_sums, uint32_t parts) {
    Combine<kHeadDim>(partials, partial_sums, parts, group, factors, target, blockIdx.z, kv_head);
  };
  if (entry == Entry::kStale) {
    if (blockIdx.x == 0) combine(nullptr, nullptr, 0);
    return;
  }
  const DeviceState state(shared.slot.slot);
  const size_t head = HeadIndex(state.block(), layer, kv_head);
  const size_t item = size_t{blockIdx.z} * gridDim.y + kv_head;
  const DecodeScratch& scratch = table->scratch;
  RowPlan plan = PlanRows(state, shared.slot.latch, head, state.slot_count(kv_head));
  plan.estimates = min(plan.estimates, scratch.clusters);
  const uint32_t rows = plan.rows();
  const uint32_t parts = min((rows + kRowsPerPart - 1) / kRowsPerPart, scratch.parts);
  if (parts == 0) {
    if (blockIdx.x == 0) combine(nullptr, nullptr, 0);
    return;
  }
  if (blockIdx.x >= parts) return;
  LoadQueries(queries, blockIdx.z, kv_head, group, shared);
  const uint32_t* const taken = scratch.taken + item * scratch.clusters;
  float* const partials = scratch.partials + item * scratch.parts * group * kHeadDim;
  float2* const partial_sums = scratch.partial_sums + item * scratch.parts * group;
  const float scale = state.block().softmax_scale * kLog2E;
  uint32_t done = 0;
  // One part a block, unless a replayed graph was captured for smaller sequences.
  for (uint32_t part = blockIdx.x; part < parts; part += gridDim.x, ++done) {
    if (threadIdx.x < kRowsPerPart) {
      PlaceRow(state, plan, head, kv_head, taken, part * kRowsPerPart + threadIdx.x,
               shared.key_rows[threadIdx.x], shared.value_rows[threadIdx.x],
               shared.biases[threadIdx.x]);
    }
    __syncthreads();
    LoadRows(state, shared);
    float logits[2][4] = {}, largest[2], sums[2];
    float output[kHeadDim / 8][4] = {};
    WaitCopies<1>();
    __syncthreads();
    Logits<Storage>(shared, scale, logits);
    Exponentials(logits, largest, sums);
    WaitCopies<0>();
    __syncthreads();
    WeighValues<Storage>(shared, logits, output);
    WritePartial(shared, output, largest, sums, group, partials + size_t{part} * group * kHeadDim,
                 partial_sums + part * group);
    __syncthreads();
  }
  if (parts > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t ticket = atomicAdd(&scratch.attend_tickets[item], done);
      shared.last = ticket + done == parts;
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
  const dim3 grid(parts > 0 ? parts : 1, shape.kv_heads, shape.count);
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
