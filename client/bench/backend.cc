// The one place that knows which backends this build has.
#include "client/bench/backend.h"

#include "client/bench/host_backend.h"
#include "gpu/status_macros.h"
#ifdef CLUSTERKV_CUDA
#include "client/bench/cuda_backend.h"
#endif

namespace clusterkv::client::bench {

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(const std::string& name) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::Device> device, gpu::CreateDevice({.backend = name}));
#ifdef CLUSTERKV_CUDA
  if (device->backend() == "cuda") return CudaBackend::Create(std::move(device));
#endif
  return HostBackend::Create(std::move(device));
}

}  // namespace clusterkv::client::bench
