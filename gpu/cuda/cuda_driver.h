// The driver's functions that the runtime library does not offer, looked up at run time: a program
// linked with -lcuda would not start on a machine without a driver.
#pragma once

#include <cuda.h>

#include "absl/status/statusor.h"

namespace clusterkv::gpu::cuda {

struct CudaDriver {
  decltype(&::cuMemCreate) mem_create = nullptr;
  decltype(&::cuMemRelease) mem_release = nullptr;
  decltype(&::cuMemAddressReserve) address_reserve = nullptr;
  decltype(&::cuMemAddressFree) address_free = nullptr;
  decltype(&::cuMemMap) mem_map = nullptr;
  decltype(&::cuMemUnmap) mem_unmap = nullptr;
  decltype(&::cuMemSetAccess) set_access = nullptr;
  decltype(&::cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&::cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&::cuMemImportFromShareableHandle) import_handle = nullptr;

  // Errors: UNAVAILABLE if the driver is missing or too old, naming the function.
  static absl::StatusOr<CudaDriver> Load();
};

}  // namespace clusterkv::gpu::cuda
