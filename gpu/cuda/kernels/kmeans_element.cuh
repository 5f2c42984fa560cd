// Storage elements eight at a time (16 bytes, one load) as fp32, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace clusterkv::gpu::cuda::kmeans {

constexpr int kVector = 8;  // elements of a 16-byte load

// Rows are read once per step and are far larger than the caches.
__device__ inline uint4 LoadOnce(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

template <typename T>
__device__ inline float2 PairToFloat(uint32_t pair);

template <>
__device__ inline float2 PairToFloat<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}

template <>
__device__ inline float2 PairToFloat<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <typename T>
__device__ inline void VectorToFloat(uint4 v, float (&x)[kVector]) {
  const uint32_t pairs[] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = PairToFloat<T>(pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float ToFloat(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T FromFloat(float x);

template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <>
__device__ inline __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}

// 1 / sqrt(squared), given in double where fp32 lost it; 0 where there is no direction.
__device__ inline float InverseRoot(double squared) {
  const float inverse = static_cast<float>(1.0 / sqrt(squared));
  return isfinite(inverse) ? inverse : 0.0f;
}

// Whether an fp32 sum of squares kept its precision.
__device__ inline bool InRange(float squared) { return squared > 1e-30f && squared < 1e30f; }

}  // namespace clusterkv::gpu::cuda::kmeans
