#include "gpu/cuda/cuda_error.h"

#include "absl/strings/str_cat.h"

namespace clusterkv::gpu::cuda {
namespace {

absl::StatusCode CodeOf(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::StatusCode::kResourceExhausted;
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInitializationError:
    case cudaErrorStubLibrary:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorDevicesUnavailable:
    case cudaErrorCompatNotSupportedOnDevice:
      return absl::StatusCode::kUnavailable;
    default:
      return absl::StatusCode::kInternal;
  }
}

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

}  // namespace

absl::Status ToStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  return absl::Status(CodeOf(error),
                      absl::StrCat("CUDA: ", View(what), ": ", cudaGetErrorName(error), ": ",
                                   cudaGetErrorString(error)));
}

absl::Status ToStatus(CUresult error, std::string_view what) {
  if (error == CUDA_SUCCESS) return absl::OkStatus();
  const absl::StatusCode code = error == CUDA_ERROR_OUT_OF_MEMORY
                                    ? absl::StatusCode::kResourceExhausted
                                    : absl::StatusCode::kInternal;
  return absl::Status(
      code, absl::StrCat("CUDA: ", View(what), ": driver error ", static_cast<int>(error)));
}

}  // namespace clusterkv::gpu::cuda
