// The one place that knows which backends this build has.
#include "absl/strings/str_cat.h"
#include "gpu/device.h"
#include "gpu/host/host_device.h"
#ifdef CLUSTERKV_CUDA
#include "gpu/cuda/cuda_device.h"
#endif

namespace clusterkv::gpu {

namespace {

absl::StatusOr<std::unique_ptr<Device>> CreateCuda(const DeviceOptions& options) {
#ifdef CLUSTERKV_CUDA
  return cuda::CudaDevice::Create(options.device, options.gpu_sharing);
#else
  (void)options;
  return absl::UnavailableError("backend is \"cuda\"; this build has no CUDA backend");
#endif
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> CreateDevice(const DeviceOptions& options) {
  if (options.backend == "cuda") return CreateCuda(options);
  if (options.backend == "auto") {
    absl::StatusOr<std::unique_ptr<Device>> device = CreateCuda(options);
    // Not there is one thing; there and broken must be heard of.
    if (!absl::IsUnavailable(device.status())) return device;
  }
  if (options.backend == "host" || options.backend == "auto") {
    if (options.gpu_sharing == GpuSharing::kLegacy) {
      return absl::InvalidArgumentError(
          "gpu-sharing is legacy; the host backend shares memory by descriptors alone");
    }
    return host::HostDevice::Create(options.threads);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("backend is \"", options.backend, "\"; allowed: auto, host, cuda"));
}

}  // namespace clusterkv::gpu
