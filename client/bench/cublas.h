// Matrix products by the machine's own cuBLAS, which nothing links: loaded when asked for. Built
// only with CLUSTERKV_CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/device.h"

namespace clusterkv::client::bench {

// bf16 with fp32 sums, in one stream; can be captured.
class Cublas {
 public:
  // Errors: UNAVAILABLE if libcublas.so.13 is not to be found.
  static absl::StatusOr<std::unique_ptr<Cublas>> Load(gpu::Device& device, cudaStream_t stream);
  ~Cublas();

  // y[rows][outputs] = x[rows][inner] times the transpose of weights[outputs][inner].
  absl::Status Multiply(const std::byte* weights, const std::byte* x, std::byte* y, uint32_t rows,
                        uint32_t outputs, uint32_t inner) const;

 private:
  struct Library;
  explicit Cublas(std::unique_ptr<Library> library);

  const std::unique_ptr<Library> library_;
  std::unique_ptr<gpu::DeviceMemory> workspace_;
};

}  // namespace clusterkv::client::bench
