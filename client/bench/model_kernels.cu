#include <cuda_bf16.h>

#include "client/bench/model_kernels.h"

namespace clusterkv::client::bench {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kNormThreads = 512;

// A bijection that mixes well (Steele, Lea, Flood: SplitMix64's finaliser).
__device__ uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__global__ void RandomKernel(__nv_bfloat16* data, size_t count, float scale, uint32_t seed) {
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += size_t{gridDim.x} * kThreads) {
    const uint64_t bits = Mix(i + (uint64_t{seed} << 40) + 0x9e3779b97f4a7c15ull);
    const float unit = static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f;
    data[i] = __float2bfloat16(unit * scale);
  }
}

// One block a row.
__global__ void __launch_bounds__(kNormThreads)
    AddAndNormalizeKernel(float* sum, const __nv_bfloat16* added, __nv_bfloat16* out,
                          uint32_t width) {
  __shared__ float warp_sums[kNormThreads / 32];
  const size_t row = size_t{blockIdx.x} * width;
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x; i < width; i += kNormThreads) {
    float value = sum[row + i];
    if (added != nullptr) {
      value += __bfloat162float(added[row + i]);
      sum[row + i] = value;
    }
    squares += value * value;
  }
  for (uint32_t step = 16; step > 0; step /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, step);
  }
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0.0f;
  for (uint32_t w = 0; w < kNormThreads / 32; ++w) squares += warp_sums[w];
  const float factor = rsqrtf(squares / static_cast<float>(width) + 1e-5f);
  for (uint32_t i = threadIdx.x; i < width; i += kNormThreads) {
    out[row + i] = __float2bfloat16(sum[row + i] * factor);
  }
}

__global__ void SiluTimesKernel(const __nv_bfloat162* both, __nv_bfloat162* out, uint32_t width) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;  // of a row's pairs
  if (i >= width) return;
  const size_t row = blockIdx.y;
  const float2 gate = __bfloat1622float2(both[2 * row * width + i]);
  const float2 up = __bfloat1622float2(both[(2 * row + 1) * width + i]);
  out[row * width + i] = __floats2bfloat162_rn(gate.x / (1.0f + expf(-gate.x)) * up.x,
                                               gate.y / (1.0f + expf(-gate.y)) * up.y);
}

__global__ void ToBf16Kernel(const float2* from, __nv_bfloat162* to, size_t count) {
  const size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) to[i] = __floats2bfloat162_rn(from[i].x, from[i].y);
}

uint32_t BlocksFor(size_t count) {
  return static_cast<uint32_t>((count + kThreads - 1) / kThreads);
}

}  // namespace

cudaError_t LaunchRandomBf16(std::byte* data, size_t count, float scale, uint32_t seed,
                             cudaStream_t stream) {
  RandomKernel<<<4096, kThreads, 0, stream>>>(reinterpret_cast<__nv_bfloat16*>(data), count, scale,
                                              seed);
  return cudaGetLastError();
}

cudaError_t LaunchAddAndNormalize(float* sum, const std::byte* added, std::byte* out, uint32_t rows,
                                  uint32_t width, cudaStream_t stream) {
  AddAndNormalizeKernel<<<rows, kNormThreads, 0, stream>>>(
      sum, reinterpret_cast<const __nv_bfloat16*>(added), reinterpret_cast<__nv_bfloat16*>(out),
      width);
  return cudaGetLastError();
}

cudaError_t LaunchSiluTimes(const std::byte* both, std::byte* out, uint32_t rows, uint32_t width,
                            cudaStream_t stream) {
  SiluTimesKernel<<<dim3(BlocksFor(width / 2), rows), kThreads, 0, stream>>>(
      reinterpret_cast<const __nv_bfloat162*>(both), reinterpret_cast<__nv_bfloat162*>(out),
      width / 2);
  return cudaGetLastError();
}

cudaError_t LaunchToBf16(const float* from, std::byte* to, size_t count, cudaStream_t stream) {
  ToBf16Kernel<<<BlocksFor(count / 2), kThreads, 0, stream>>>(
      reinterpret_cast<const float2*>(from), reinterpret_cast<__nv_bfloat162*>(to), count / 2);
  return cudaGetLastError();
}

}  // namespace clusterkv::client::bench
