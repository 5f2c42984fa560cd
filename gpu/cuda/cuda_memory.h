// Memory of the cuda backend: private, pinned on the host, or shared by a file descriptor.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "gpu/cuda/cuda_driver.h"
#include "gpu/device.h"
#include "gpu/mapping.h"

namespace clusterkv::gpu::cuda {

// The calling thread works on `ordinal` while this lives.
class ScopedDevice {
 public:
  explicit ScopedDevice(int ordinal);
  ~ScopedDevice();
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;

 private:
  int previous_ = -1;  // -1: nothing to restore
};

// Waits until it is done.
absl::Status ZeroDevice(int ordinal, void* data, size_t bytes);

// cudaMalloc. Zeroed.
absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocatePrivate(int ordinal, size_t bytes);
// cudaHostAlloc: kernels use it at the host's address. Zeroed.
absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocatePinnedHost(int ordinal, size_t bytes);
// CUDA virtual memory with a POSIX file descriptor (design D1). The driver counts who maps it: it
// is handed to nobody else until the last of them has let go or is dead. Zeroed.
absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocateVirtual(const CudaDriver& driver, int ordinal,
                                                              size_t bytes);
absl::StatusOr<std::unique_ptr<DeviceMemory>> ImportVirtual(const CudaDriver& driver, int ordinal,
                                                            UniqueFd fd, size_t bytes);

// Pins mapped host memory, so that kernels reach it at the host's address.
// Errors: RESOURCE_EXHAUSTED (memlock, see the message), INTERNAL.
absl::StatusOr<std::unique_ptr<HostRegistration>> RegisterHostMemory(int ordinal, std::byte* data,
                                                                     size_t bytes,
                                                                     MapAccess access);

}  // namespace clusterkv::gpu::cuda
