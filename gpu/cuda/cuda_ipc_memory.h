// Memory shared by CUDA's legacy handles (cudaIpcGetMemHandle), for drivers without virtual memory
// that goes by descriptors. The handle lies in a small sealed file, whose descriptor is what goes
// out: it passes as others do, and only who was handed it can read it.
//
// Nobody counts who has it open. To free it while another process does is undefined, and in truth
// hands it on: the owner must know that no other process maps it (Device::counts_importers).
// A process opens a handle only of a process with another number than its own: two containers that
// are each pid 1 cannot share by it.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/unique_fd.h"

namespace clusterkv::gpu::cuda {

// cudaMalloc, of whole blocks. Zeroed.
absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocateIpc(int ordinal, size_t bytes);
// Is it a file with a handle in it?
bool HoldsIpcHandle(const UniqueFd& fd);
// Errors: INVALID_ARGUMENT if it is shorter than `bytes`, or of this process.
absl::StatusOr<std::unique_ptr<DeviceMemory>> ImportIpc(int ordinal, const UniqueFd& fd,
                                                        size_t bytes);

}  // namespace clusterkv::gpu::cuda
