// Attention of one warp over tiles of 16 rows: the inner loop of Attend and of DecodeLayer.
//
//   a tile:  K ─► 16 x 16 logits ─► weights ─┐
//            V ──────────────────────────────┴─► output, largest logit, sum (online softmax)
//
// A warp has its own tile in shared memory and waits for no other. While it computes with the keys
// of a tile the values are on their way, and the next tile's keys while it weighs the values. The
// query heads of the group are packed into the 16 rows of the tensor cores' product. Weights are
// split in two halves of the storage type, so that the second product keeps fp32's accuracy.
#pragma once

#include <cfloat>

#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/numeric.cuh"

namespace clusterkv::gpu::cuda {

constexpr uint32_t kTileRows = 16;
constexpr float kLog2E = 1.4426950408889634f;

// Rows of 16-byte chunks; chunk c of row r lies at Swizzled(r, c), so that eight rows' chunks of
// one column lie in different banks.
template <int kHeadDim>
using TileRows = uint4[kTileRows][kHeadDim / 8];

template <int kHeadDim>
struct Tile {
  TileRows<kHeadDim> keys, values;
};

template <int kHeadDim>
__device__ uint32_t Swizzled(uint32_t row, uint32_t chunk) {
  // Of 96 elements the last four chunks can only trade places with each other.
  return chunk < kHeadDim / 64 * 8 ? chunk ^ (row & 7) : chunk ^ (row & 3);
}

// One row of a tile; held by lane row % 16.
struct TileRow {
  const std::byte* key = nullptr;  // null: no row
  const std::byte* value = nullptr;
  std::byte* kept = nullptr;  // where K and V are to be kept besides; null: nowhere
  float bias = -INFINITY;     // added to the logit, in units of log2; -inf: not attended
};

__device__ inline void AddScaled(float4& sum, float factor, const float4& value) {
  sum.x += factor * value.x;
  sum.y += factor * value.y;
  sum.z += factor * value.z;
  sum.w += factor * value.w;
}

// The group's query heads, zeros up to 16, by kThreads threads. They are there after WaitCopies<0>
// and a barrier.
template <int kHeadDim, uint32_t kThreads>
__device__ void StartGroupQueries(const QueryLaunch& queries, uint32_t slot, uint32_t kv_head,
                                  uint32_t group, TileRows<kHeadDim>& rows) {
  constexpr uint32_t kChunks = kHeadDim / 8;
  const std::byte* const first =
      queries.q + slot * queries.batch_stride + kv_head * group * queries.head_stride;
  // The caller's rows need not be aligned to more than an element.
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(first) | queries.head_stride) & (sizeof(uint4) - 1)) == 0;
  for (uint32_t i = threadIdx.x; i < kMaxGroup * kChunks; i += kThreads) {
    const uint32_t head = i / kChunks, chunk = i % kChunks;
    uint4* const to = &rows[head][Swizzled<kHeadDim>(head, chunk)];
    const std::byte* const from = first + head * queries.head_stride + 16 * chunk;
    if (head >= group) {
      *to = make_uint4(0, 0, 0, 0);
    } else if (aligned) {
      CopyAsync16(to, from, true);
    } else {
      for (uint32_t e = 0; e < 8; ++e) {
        reinterpret_cast<uint16_t*>(to)[e] = reinterpret_cast<const uint16_t*>(from)[e];
      }
    }
  }
  CommitCopies();
}

// Tiles of a warp, in turn: `index`, then every step-th below `end`.
struct TileRun {
  uint32_t index, step, end;

  __device__ bool more() const { return index < end; }
  __device__ void Advance() { index += step; }
};

template <typename Storage, int kHeadDim>
class WarpAttention {
 public:
  // output[n] holds elements 8 n + 2 (lane % 4), + 1 of query rows lane / 4 and lane / 4 + 8, in
  // turn; largest and sums are those rows', in units of log2.
  float output[kHeadDim / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};
  float sums[2] = {0.0f, 0.0f};

  // tiles: a TileRun, or one like it. place(index) finds row `index` of all, on the lane that holds
  // it. All lanes of the warp. `nowhere`: 16 readable bytes of device memory.
  template <typename Tiles, typename Place>
  __device__ void Attend(Tiles tiles, const Place& place, const TileRows<kHeadDim>& queries,
                         float scale, const std::byte* nowhere, Tile<kHeadDim>& tile) {
    const uint32_t row_lane = threadIdx.x % kTileRows;
    if (!tiles.more()) return;
    TileRow row = place(tiles.index * kTileRows + row_lane);
    Load(row.key, nowhere, tile.keys);
    Load(row.value, nowhere, tile.values);
    for (bool more = true; more;) {
      tiles.Advance();
      more = tiles.more();
      TileRow next;
      if (more) next = place(tiles.index * kTileRows + row_lane);
      WaitCopies<1>();  // the keys
      __syncwarp();
      float weights[2][4] = {};
      Logits(tile.keys, queries, scale, row.bias, weights);
      Keep(tile.keys, row.kept, 0);
      __syncwarp();
      if (more) {
        Load(next.key, nowhere, tile.keys);
      } else {
        CommitCopies();
      }
      Exponentials(weights);
      WaitCopies<1>();  // the values
      __syncwarp();
      Weigh(tile.values, weights);
      Keep(tile.values, row.kept, kHeadDim * 2);
      __syncwarp();
      if (more) {
        Load(next.value, nowhere, tile.values);
      } else {
        CommitCopies();
      }
      row = next;
    }
    WaitCopies<0>();
  }

 private:
  static constexpr uint32_t kChunks = kHeadDim / 8;
  static constexpr uint32_t kLoads = kTileRows * kChunks / 32;

  // One half of each row, 16 bytes a lane and round. Of a row that is not there zeros: a weight of
  // 0 times garbage could be NaN.
  static __device__ void Load(const std::byte* row, const std::byte* nowhere,
                              TileRows<kHeadDim>& rows) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) {
      const uint32_t r = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
      const auto from = reinterpret_cast<const std::byte*>(
          __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), r));
      CopyAsync16(&rows[r][Swizzled<kHeadDim>(r, chunk)],
                  from == nullptr ? nowhere : from + 16 * chunk, from != nullptr);
    }
    CommitCopies();
  }

  // Rows that came from the host store go on to their cache slots.
  static __device__ void Keep(const TileRows<kHeadDim>& rows, std::byte* kept, uint32_t offset) {
    if (!__any_sync(0xffffffffu, kept != nullptr)) return;
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll 4
    for (uint32_t i = 0; i < kLoads; ++i) {
      const uint32_t r = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
      auto* const to = reinterpret_cast<std::byte*>(
          __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(kept), r));
      if (to == nullptr) continue;
      *reinterpret_cast<uint4*>(to + offset + 16 * chunk) = rows[r][Swizzled<kHeadDim>(r, chunk)];
    }
  }

  // Thread t holds query rows t / 4 and t / 4 + 8, keys 2 (t % 4), + 1, + 8, + 9, in units of log2.
  static __device__ void Logits(const TileRows<kHeadDim>& keys, const TileRows<kHeadDim>& queries,
                                float scale, float bias, float (&logits)[2][4]) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t step = 0; step < kHeadDim / 16; ++step) {
      uint32_t a[4], b[4];
      const uint32_t query_row = lane % 16;
      LoadMatrix4(a, &queries[query_row][Swizzled<kHeadDim>(query_row, 2 * step + lane / 16)]);
      // Tiles of 8: keys 0-7 and 8-15, of each both halves of the 16 elements.
      const uint32_t key_row = lane % 8 + (lane / 16) * 8;
      LoadMatrix4(b, &keys[key_row][Swizzled<kHeadDim>(key_row, 2 * step + lane / 8 % 2)]);
      Storage::Mma(logits[0], a, b[0], b[1]);
      Storage::Mma(logits[1], a, b[2], b[3]);
    }
    const uint32_t key = lane % 4 * 2;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const float own = __shfl_sync(0xffffffffu, bias, key + 8 * half + i);
        // Not a product with -inf: of a row that is not there nothing must remain, not even NaN.
        logits[half][i] = own == -INFINITY ? -INFINITY : logits[half][i] * scale + own;
        logits[half][2 + i] = own == -INFINITY ? -INFINITY : logits[half][2 + i] * scale + own;
      }
    }
  }

  // Logits become weights relative to the largest so far; what was summed before is scaled to it.
  __device__ void Exponentials(float (&logits)[2][4]) {
#pragma unroll
    for (uint32_t row = 0; row < 2; ++row) {
      float most = fmaxf(fmaxf(logits[0][2 * row], logits[0][2 * row + 1]),
                         fmaxf(logits[1][2 * row], logits[1][2 * row + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      most = fmaxf(most, largest[row]);
      const float base = most == -INFINITY ? 0.0f : most;
      const float factor = exp2f(largest[row] - base);
      largest[row] = most;
      float sum = 0.0f;
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          float& weight = logits[half][2 * row + i];
          weight = exp2f(weight - base);
          sum += weight;
        }
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      sums[row] = sums[row] * factor + sum;
#pragma unroll
      for (uint32_t n = 0; n < kHeadDim / 8; ++n) {
        output[n][2 * row] *= factor;
        output[n][2 * row + 1] *= factor;
      }
    }
  }

  __device__ void Weigh(const TileRows<kHeadDim>& values, const float (&weights)[2][4]) {
    const uint32_t lane = threadIdx.x % 32;
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
      const uint32_t row = lane % 16;
      LoadMatrix4Transposed(b, &values[row][Swizzled<kHeadDim>(row, 2 * pair + lane / 16)]);
      Storage::Mma(output[2 * pair], high, b[0], b[1]);
      Storage::Mma(output[2 * pair], low, b[0], b[1]);
      Storage::Mma(output[2 * pair + 1], high, b[2], b[3]);
      Storage::Mma(output[2 * pair + 1], low, b[2], b[3]);
    }
  }
};

// What the warps of a block found, in shared memory, and what their outputs weigh in the block's.
template <uint32_t kWarps>
struct WarpSums {
  float largest[kWarps][kMaxGroup], sums[kWarps][kMaxGroup];
  float factors[kWarps][kMaxGroup];
  float2 block[kMaxGroup];  // largest, sum
};

// Lays the warps' outputs out in `outputs`, [warp][16][head_dim], which may be their tiles. All
// threads of the block.
template <typename Storage, int kHeadDim, uint32_t kWarps>
__device__ void ShareOutputs(const WarpAttention<Storage, kHeadDim>& own, uint32_t group,
                             float* outputs, WarpSums<kWarps>& shared) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane % 4 == 0) {
#pragma unroll
    for (uint32_t row = 0; row < 2; ++row) {
      shared.largest[warp][lane / 4 + 8 * row] = own.largest[row];
      shared.sums[warp][lane / 4 + 8 * row] = own.sums[row];
    }
  }
  __syncthreads();  // all tiles are read
#pragma unroll
  for (uint32_t n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
    for (uint32_t row = 0; row < 2; ++row) {
      const uint32_t g = lane / 4 + 8 * row;
      if (g >= group) continue;
      *reinterpret_cast<float2*>(&outputs[(warp * 16 + g) * kHeadDim + 8 * n + lane % 4 * 2]) =
          make_float2(own.output[n][2 * row], own.output[n][2 * row + 1]);
    }
  }
  if (threadIdx.x < group) {
    const uint32_t g = threadIdx.x;
    float most = -INFINITY;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) most = fmaxf(most, shared.largest[w][g]);
    float sum = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      const float largest = shared.largest[w][g];
      const float factor = largest == -INFINITY ? 0.0f : exp2f(largest - most);
      shared.factors[w][g] = factor;
      sum += factor * shared.sums[w][g];
    }
    shared.block[g] = make_float2(most, sum);
  }
  __syncthreads();
}

// Elements 4 chunk to 4 chunk + 3 of the block's output for query head g.
template <int kHeadDim, uint32_t kWarps>
__device__ float4 CombineWarps(const float* outputs, const WarpSums<kWarps>& shared, uint32_t g,
                               uint32_t chunk) {
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (uint32_t w = 0; w < kWarps; ++w) {
    const float factor = shared.factors[w][g];
    // Of a warp without rows the output is 0: so is the product.
    AddScaled(value, factor,
              *reinterpret_cast<const float4*>(&outputs[(w * 16 + g) * kHeadDim + 4 * chunk]));
  }
  return value;
}

}  // namespace clusterkv::gpu::cuda
