// The one place that knows which backends this build has.
#include "absl/strings/str_cat.h"
#include "gpu/device.h"
#include "gpu/host/host_device.h"

namespace clusterkv::gpu {

absl::StatusOr<std::unique_ptr<Device>> CreateDevice(const DeviceOptions& options) {
  if (options.backend == "cuda") {
    return absl::UnavailableError("backend is \"cuda\"; this build has no CUDA backend");
  }
  if (options.backend == "host" || options.backend == "auto") {
    return host::HostDevice::Create(options.threads);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("backend is \"", options.backend, "\"; allowed: auto, host, cuda"));
}

}  // namespace clusterkv::gpu
