#include "gpu/host/simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// The kernels keep arrays of vectors, which the targets of unknown length cannot.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gpu/host/simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// After highway.h: compiled once for each target.
#include "hwy/contrib/math/math-inl.h"

// Scalar conversions, for the last elements of odd lengths and for targets without fp16.
#ifndef CLUSTERKV_GPU_HOST_SIMD_SCALAR_
#define CLUSTERKV_GPU_HOST_SIMD_SCALAR_
namespace clusterkv::gpu::host::scalar {

inline uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float Bf16ToFloat(uint16_t half) { return FromBits(uint32_t{half} << 16); }

inline uint16_t FloatToBf16(float value) {
  const uint32_t bits = Bits(value);
  // Rounding could carry a NaN into infinity: keep it, quiet.
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float Fp16ToFloat(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00) return FromBits(sign | 0x7f800000u | ((magnitude & 0x3ff) << 13));
  // The exponent's bias differs by 112; the product is exact, for subnormals too.
  return FromBits(sign | Bits(FromBits(magnitude << 13) * 0x1p112f));
}

inline uint16_t FloatToFp16(float value) {
  const uint32_t bits = Bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((bits >> 13) & 0x3ff));
  // 65,520 and above round to infinity.
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves units of 2^-24 in the last bits, rounded to even.
    return static_cast<uint16_t>(sign | (Bits(FromBits(magnitude) + 0.5f) - Bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

// Element i of storage; any alignment.
inline float Load(DType dtype, const std::byte* row, size_t i) {
  if (dtype == DType::kFp32) {
    float value;
    std::memcpy(&value, row + 4 * i, sizeof(value));
    return value;
  }
  uint16_t half;
  std::memcpy(&half, row + 2 * i, sizeof(half));
  return dtype == DType::kBf16 ? Bf16ToFloat(half) : Fp16ToFloat(half);
}

inline void Store(DType dtype, float value, std::byte* row, size_t i) {
  if (dtype == DType::kFp32) {
    std::memcpy(row + 4 * i, &value, sizeof(value));
    return;
  }
  const uint16_t half = dtype == DType::kBf16 ? FloatToBf16(value) : FloatToFp16(value);
  std::memcpy(row + 2 * i, &half, sizeof(half));
}

}  // namespace clusterkv::gpu::host::scalar
#endif  // CLUSTERKV_GPU_HOST_SIMD_SCALAR_

HWY_BEFORE_NAMESPACE();
namespace clusterkv::gpu::host::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;
using HalfTag = hn::Rebind<uint16_t, FloatTag>;
using WordTag = hn::Rebind<uint32_t, FloatTag>;

// F16C comes with AVX2; Highway's emulation below it is right for neither NaN nor rounding.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)
constexpr bool kHardwareFp16 = true;
#else
constexpr bool kHardwareFp16 = false;
#endif

template <DType kDType>
HWY_INLINE FloatVec LoadAs(const std::byte* p) {
  const FloatTag df;
  if constexpr (kDType == DType::kFp32) {
    return hn::LoadU(df, reinterpret_cast<const float*>(p));
  } else {
    const auto half = hn::LoadU(HalfTag(), reinterpret_cast<const uint16_t*>(p));
    if constexpr (kDType == DType::kBf16) {
      return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(WordTag(), half)));
    } else if constexpr (kHardwareFp16) {
      return hn::PromoteTo(df, hn::BitCast(hn::Rebind<hwy::float16_t, FloatTag>(), half));
    } else {
      const WordTag dw;
      const auto word = hn::PromoteTo(dw, half);
      const auto magnitude = hn::And(word, hn::Set(dw, 0x7fffu));
      const auto sign = hn::ShiftLeft<16>(hn::And(word, hn::Set(dw, 0x8000u)));
      const auto shifted = hn::ShiftLeft<13>(magnitude);
      // As scalar::Fp16ToFloat.
      const auto finite = hn::BitCast(dw, hn::Mul(hn::BitCast(df, shifted), hn::Set(df, 0x1p112f)));
      const auto special = hn::Or(shifted, hn::Set(dw, 0x7f800000u));
      const auto is_special = hn::Gt(magnitude, hn::Set(dw, 0x7bffu));
      return hn::BitCast(df, hn::Or(sign, hn::IfThenElse(is_special, special, finite)));
    }
  }
}

template <DType kDType>
HWY_INLINE void StoreAs(FloatVec value, std::byte* p) {
  const FloatTag df;
  if constexpr (kDType == DType::kFp32) {
    hn::StoreU(value, df, reinterpret_cast<float*>(p));
  } else if constexpr (kDType == DType::kBf16) {
    const WordTag dw;
    const auto bits = hn::BitCast(dw, value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(dw, 1u));
    const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(dw, 0x7fffu)));
    const auto quiet = hn::Or(bits, hn::Set(dw, 0x400000u));
    const auto is_nan = hn::RebindMask(dw, hn::IsNaN(value));
    const auto high = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
    hn::StoreU(hn::TruncateTo(HalfTag(), high), HalfTag(), reinterpret_cast<uint16_t*>(p));
  } else if constexpr (kHardwareFp16) {
    const auto half = hn::DemoteTo(hn::Rebind<hwy::float16_t, FloatTag>(), value);
    hn::StoreU(hn::BitCast(HalfTag(), half), HalfTag(), reinterpret_cast<uint16_t*>(p));
  } else {
    HWY_ALIGN float lanes[hn::MaxLanes(FloatTag())];
    hn::Store(value, df, lanes);
    for (size_t i = 0; i < hn::Lanes(df); ++i) scalar::Store(kDType, lanes[i], p, i);
  }
}

template <DType kDType>
void ToFloatAs(const std::byte* source, float* destination, size_t n) {
  const FloatTag df;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(LoadAs<kDType>(source + i * SizeOf(kDType)), df, destination + i);
  }
  for (; i < n; ++i) destination[i] = scalar::Load(kDType, source, i);
}

template <DType kDType>
void FromFloatAs(const float* source, std::byte* destination, size_t n) {
  const FloatTag df;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    StoreAs<kDType>(hn::LoadU(df, source + i), destination + i * SizeOf(kDType));
  }
  for (; i < n; ++i) scalar::Store(kDType, source[i], destination, i);
}

// kGroup vectors against kRows rows: kGroup * kRows accumulators hide the latency of FMA.
template <DType kDType, int kGroup, int kRows>
HWY_INLINE void DotTile(const float* vectors, const std::byte* const* rows, size_t n, float* dots,
                        size_t dots_stride) {
  const FloatTag df;
  const size_t lanes = hn::Lanes(df);
  FloatVec sum[kGroup][kRows];
  for (int g = 0; g < kGroup; ++g) {
    for (int r = 0; r < kRows; ++r) sum[g][r] = hn::Zero(df);
  }
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    FloatVec row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = LoadAs<kDType>(rows[r] + i * SizeOf(kDType));
    for (int g = 0; g < kGroup; ++g) {
      const FloatVec vector = hn::LoadU(df, vectors + static_cast<size_t>(g) * n + i);
      for (int r = 0; r < kRows; ++r) sum[g][r] = hn::MulAdd(vector, row[r], sum[g][r]);
    }
  }
  for (int g = 0; g < kGroup; ++g) {
    for (int r = 0; r < kRows; ++r) {
      float dot = hn::GetLane(hn::SumOfLanes(df, sum[g][r]));
      for (size_t tail = i; tail < n; ++tail) {
        dot += vectors[static_cast<size_t>(g) * n + tail] * scalar::Load(kDType, rows[r], tail);
      }
      dots[static_cast<size_t>(g) * dots_stride + static_cast<size_t>(r)] = dot;
    }
  }
}

template <DType kDType, int kGroup, int kRows>
void DotTiles(const float* vectors, const std::byte* const* rows, size_t count, size_t n,
              float* dots, size_t dots_stride) {
  size_t r = 0;
  for (; r + kRows <= count; r += kRows) {
    DotTile<kDType, kGroup, kRows>(vectors, rows + r, n, dots + r, dots_stride);
  }
  for (; r < count; ++r) {
    DotTile<kDType, kGroup, 1>(vectors, rows + r, n, dots + r, dots_stride);
  }
}

template <DType kDType>
void DotGroupAs(const float* vectors, size_t group, const std::byte* const* rows, size_t count,
                size_t n, float* dots, size_t dots_stride) {
  size_t g = 0;
  for (; g + 4 <= group; g += 4) {
    DotTiles<kDType, 4, 2>(vectors + g * n, rows, count, n, dots + g * dots_stride, dots_stride);
  }
  for (; g + 2 <= group; g += 2) {
    DotTiles<kDType, 2, 4>(vectors + g * n, rows, count, n, dots + g * dots_stride, dots_stride);
  }
  for (; g < group; ++g) {
    DotTiles<kDType, 1, 8>(vectors + g * n, rows, count, n, dots + g * dots_stride, dots_stride);
  }
}

template <DType kDType>
void DotRowsAs(const float* vector, const std::byte* first_row, size_t row_stride, size_t count,
               size_t n, float* result) {
  constexpr size_t kTile = 8;
  const std::byte* rows[kTile];
  for (size_t begin = 0; begin < count; begin += kTile) {
    const size_t tile = std::min(kTile, count - begin);
    for (size_t r = 0; r < tile; ++r) rows[r] = first_row + (begin + r) * row_stride;
    DotTiles<kDType, 1, 8>(vector, rows, tile, n, result + begin, 0);
  }
}

// Accumulators of kGroup vectors stay in registers over all rows, kColumns vectors at a time.
template <DType kDType, int kGroup, int kColumns>
HWY_INLINE void WeightedTile(const float* weights, size_t weights_stride,
                             const std::byte* const* rows, size_t count, size_t n, size_t column,
                             float* accumulators) {
  const FloatTag df;
  const size_t lanes = hn::Lanes(df);
  FloatVec sum[kGroup][kColumns];
  for (size_t g = 0; g < kGroup; ++g) {
    for (size_t c = 0; c < kColumns; ++c) {
      sum[g][c] = hn::LoadU(df, accumulators + g * n + column + c * lanes);
    }
  }
  for (size_t r = 0; r < count; ++r) {
    FloatVec row[kColumns];
    for (size_t c = 0; c < kColumns; ++c) {
      row[c] = LoadAs<kDType>(rows[r] + (column + c * lanes) * SizeOf(kDType));
    }
    for (size_t g = 0; g < kGroup; ++g) {
      const FloatVec weight = hn::Set(df, weights[g * weights_stride + r]);
      for (size_t c = 0; c < kColumns; ++c) sum[g][c] = hn::MulAdd(weight, row[c], sum[g][c]);
    }
  }
  for (size_t g = 0; g < kGroup; ++g) {
    for (size_t c = 0; c < kColumns; ++c) {
      hn::StoreU(sum[g][c], df, accumulators + g * n + column + c * lanes);
    }
  }
}

template <DType kDType, int kGroup, int kColumns>
void WeightedTiles(const float* weights, size_t weights_stride, const std::byte* const* rows,
                   size_t count, size_t n, float* accumulators) {
  const size_t lanes = hn::Lanes(FloatTag());
  size_t column = 0;
  for (; column + kColumns * lanes <= n; column += kColumns * lanes) {
    WeightedTile<kDType, kGroup, kColumns>(weights, weights_stride, rows, count, n, column,
                                           accumulators);
  }
  for (; column + lanes <= n; column += lanes) {
    WeightedTile<kDType, kGroup, 1>(weights, weights_stride, rows, count, n, column, accumulators);
  }
  for (; column < n; ++column) {
    for (size_t r = 0; r < count; ++r) {
      const float value = scalar::Load(kDType, rows[r], column);
      for (size_t g = 0; g < kGroup; ++g) {
        accumulators[g * n + column] += weights[g * weights_stride + r] * value;
      }
    }
  }
}

template <DType kDType>
void AddWeightedRowsAs(const float* weights, size_t weights_stride, size_t group,
                       const std::byte* const* rows, size_t count, size_t n, float* accumulators) {
  size_t g = 0;
  for (; g + 4 <= group; g += 4) {
    WeightedTiles<kDType, 4, 2>(weights + g * weights_stride, weights_stride, rows, count, n,
                                accumulators + g * n);
  }
  for (; g + 2 <= group; g += 2) {
    WeightedTiles<kDType, 2, 4>(weights + g * weights_stride, weights_stride, rows, count, n,
                                accumulators + g * n);
  }
  for (; g < group; ++g) {
    WeightedTiles<kDType, 1, 8>(weights + g * weights_stride, weights_stride, rows, count, n,
                                accumulators + g * n);
  }
}

// Calls Name##As<dtype>; storage types are a template argument only inside.
#define CLUSTERKV_FOR_DTYPE(name, ...)            \
  switch (dtype) {                                \
    case DType::kBf16:                            \
      return name##As<DType::kBf16>(__VA_ARGS__); \
    case DType::kFp16:                            \
      return name##As<DType::kFp16>(__VA_ARGS__); \
    case DType::kFp32:                            \
      return name##As<DType::kFp32>(__VA_ARGS__); \
  }

void ToFloat(DType dtype, const void* source, float* destination, size_t n) {
  CLUSTERKV_FOR_DTYPE(ToFloat, static_cast<const std::byte*>(source), destination, n)
}

void FromFloat(DType dtype, const float* source, void* destination, size_t n) {
  CLUSTERKV_FOR_DTYPE(FromFloat, source, static_cast<std::byte*>(destination), n)
}

void DotRows(DType dtype, const float* vector, const std::byte* first_row, size_t row_stride,
             size_t rows, size_t n, float* result) {
  CLUSTERKV_FOR_DTYPE(DotRows, vector, first_row, row_stride, rows, n, result)
}

void DotGroup(DType dtype, const float* vectors, size_t group, const std::byte* const* rows,
              size_t count, size_t n, float* dots, size_t dots_stride) {
  CLUSTERKV_FOR_DTYPE(DotGroup, vectors, group, rows, count, n, dots, dots_stride)
}

void AddWeightedRows(DType dtype, const float* weights, size_t weights_stride, size_t group,
                     const std::byte* const* rows, size_t count, size_t n, float* accumulators) {
  CLUSTERKV_FOR_DTYPE(AddWeightedRows, weights, weights_stride, group, rows, count, n, accumulators)
}

#undef CLUSTERKV_FOR_DTYPE

void Scale(float factor, float* vector, size_t n) {
  const FloatTag df;
  const size_t lanes = hn::Lanes(df);
  const FloatVec factors = hn::Set(df, factor);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::Mul(factors, hn::LoadU(df, vector + i)), df, vector + i);
  }
  for (; i < n; ++i) vector[i] *= factor;
}

float Max(const float* values, size_t n) {
  const FloatTag df;
  const size_t lanes = hn::Lanes(df);
  float largest = -std::numeric_limits<float>::infinity();
  size_t i = 0;
  if (n >= lanes) {
    FloatVec best = hn::Set(df, largest);
    for (; i + lanes <= n; i += lanes) {
      const FloatVec value = hn::LoadU(df, values + i);
      // A comparison with NaN is false on every target; Max would differ between them.
      best = hn::IfThenElse(hn::Gt(value, best), value, best);
    }
    largest = hn::GetLane(hn::MaxOfLanes(df, best));
  }
  for (; i < n; ++i) {
    if (values[i] > largest) largest = values[i];
  }
  return largest;
}

float ExpSum(float shift, float* values, size_t n) {
  const FloatTag df;
  const size_t lanes = hn::Lanes(df);
  const FloatVec shifts = hn::Set(df, shift);
  FloatVec sums = hn::Zero(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const FloatVec x = hn::Sub(hn::LoadU(df, values + i), shifts);
    // Highway's Exp turns NaN into 0.
    const FloatVec e = hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(df, x));
    hn::StoreU(e, df, values + i);
    sums = hn::Add(sums, e);
  }
  float sum = hn::GetLane(hn::SumOfLanes(df, sums));
  for (; i < n; ++i) {
    values[i] = std::exp(values[i] - shift);
    sum += values[i];
  }
  return sum;
}

}  // namespace
}  // namespace clusterkv::gpu::host::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterkv::gpu::host {

HWY_EXPORT(ToFloat);
HWY_EXPORT(FromFloat);
HWY_EXPORT(DotRows);
HWY_EXPORT(DotGroup);
HWY_EXPORT(AddWeightedRows);
HWY_EXPORT(Scale);
HWY_EXPORT(Max);
HWY_EXPORT(ExpSum);

void ToFloat(DType dtype, const void* source, float* destination, size_t n) {
  HWY_DYNAMIC_DISPATCH(ToFloat)(dtype, source, destination, n);
}

void FromFloat(DType dtype, const float* source, void* destination, size_t n) {
  HWY_DYNAMIC_DISPATCH(FromFloat)(dtype, source, destination, n);
}

float Dot(const float* a, const float* b, size_t n) {
  float dot = 0.0f;
  HWY_DYNAMIC_DISPATCH(DotRows)
  (DType::kFp32, a, reinterpret_cast<const std::byte*>(b), 0, 1, n, &dot);
  return dot;
}

void DotRows(DType dtype, const float* vector, const std::byte* first_row, size_t row_stride,
             size_t rows, size_t n, float* result) {
  HWY_DYNAMIC_DISPATCH(DotRows)(dtype, vector, first_row, row_stride, rows, n, result);
}

void AddScaled(DType dtype, float weight, const void* row, float* accumulator, size_t n) {
  const std::byte* const rows[] = {static_cast<const std::byte*>(row)};
  HWY_DYNAMIC_DISPATCH(AddWeightedRows)(dtype, &weight, 0, 1, rows, 1, n, accumulator);
}

void Scale(float factor, float* vector, size_t n) {
  HWY_DYNAMIC_DISPATCH(Scale)(factor, vector, n);
}

float Max(const float* values, size_t n) { return HWY_DYNAMIC_DISPATCH(Max)(values, n); }

float ExpSum(float shift, float* values, size_t n) {
  return HWY_DYNAMIC_DISPATCH(ExpSum)(shift, values, n);
}

void DotGroup(DType dtype, const float* vectors, size_t group, const std::byte* const* rows,
              size_t count, size_t n, float* dots, size_t dots_stride) {
  HWY_DYNAMIC_DISPATCH(DotGroup)(dtype, vectors, group, rows, count, n, dots, dots_stride);
}

void AddWeightedRows(DType dtype, const float* weights, size_t weights_stride, size_t group,
                     const std::byte* const* rows, size_t count, size_t n, float* accumulators) {
  HWY_DYNAMIC_DISPATCH(AddWeightedRows)
  (dtype, weights, weights_stride, group, rows, count, n, accumulators);
}

}  // namespace clusterkv::gpu::host
#endif  // HWY_ONCE
