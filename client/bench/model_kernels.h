// What a decode step has beside products of matrices and our own operations. Device memory, bf16
// unless said. Built only with CLUSTERKV_CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace clusterkv::client::bench {

// Uniform in [-scale, scale).
cudaError_t LaunchRandomBf16(std::byte* data, size_t count, float scale, uint32_t seed,
                             cudaStream_t stream);
// sum[row] += added[row] (unless null); out[row] = sum[row] / its root mean square.
cudaError_t LaunchAddAndNormalize(float* sum, const std::byte* added, std::byte* out, uint32_t rows,
                                  uint32_t width, cudaStream_t stream);
// out[row][i] = silu(both[row][i]) * both[row][width + i].
cudaError_t LaunchSiluTimes(const std::byte* both, std::byte* out, uint32_t rows, uint32_t width,
                            cudaStream_t stream);
cudaError_t LaunchToBf16(const float* from, std::byte* to, size_t count, cudaStream_t stream);

}  // namespace clusterkv::client::bench
