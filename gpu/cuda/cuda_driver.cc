#include "gpu/cuda/cuda_driver.h"

#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::cuda {
namespace {

// The interface that these functions had then; later drivers still have it.
constexpr unsigned kDriverInterface = 12000;

template <typename Function>
absl::Status Find(const char* name, Function& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, kDriverInterface, cudaEnableDefault, &result);
  if (error != cudaSuccess) return ToStatus(error, name);
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    return absl::UnavailableError(absl::StrCat("CUDA: this driver has no ", name));
  }
  function = reinterpret_cast<Function>(found);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CudaDriver> CudaDriver::Load() {
  CudaDriver driver;
  CKV_RETURN_IF_ERROR(Find("cuMemCreate", driver.mem_create));
  CKV_RETURN_IF_ERROR(Find("cuMemRelease", driver.mem_release));
  CKV_RETURN_IF_ERROR(Find("cuMemAddressReserve", driver.address_reserve));
  CKV_RETURN_IF_ERROR(Find("cuMemAddressFree", driver.address_free));
  CKV_RETURN_IF_ERROR(Find("cuMemMap", driver.mem_map));
  CKV_RETURN_IF_ERROR(Find("cuMemUnmap", driver.mem_unmap));
  CKV_RETURN_IF_ERROR(Find("cuMemSetAccess", driver.set_access));
  CKV_RETURN_IF_ERROR(Find("cuMemGetAllocationGranularity", driver.granularity));
  CKV_RETURN_IF_ERROR(Find("cuMemExportToShareableHandle", driver.export_handle));
  CKV_RETURN_IF_ERROR(Find("cuMemImportFromShareableHandle", driver.import_handle));
  return driver;
}

}  // namespace clusterkv::gpu::cuda
