// The one place where CUDA's errors become ours.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string_view>

#include "absl/status/status.h"

namespace clusterkv::gpu::cuda {

// `what` says which operation, with its numbers. Allocation failures are RESOURCE_EXHAUSTED, a
// missing driver or device UNAVAILABLE, everything else INTERNAL. Clears the runtime's last error;
// after a sticky one (a fault in a kernel) every later call fails with it: the device is dead.
absl::Status ToStatus(cudaError_t error, std::string_view what);
absl::Status ToStatus(CUresult error, std::string_view what);

}  // namespace clusterkv::gpu::cuda

#define CKV_RETURN_IF_CUDA_ERROR(expression, what)                    \
  do {                                                                \
    const auto ckv_cuda_error_ = (expression);                        \
    if (static_cast<int>(ckv_cuda_error_) != 0) {                     \
      return ::clusterkv::gpu::cuda::ToStatus(ckv_cuda_error_, what); \
    }                                                                 \
  } while (false)
