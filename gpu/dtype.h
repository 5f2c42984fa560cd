// Names of the storage types of K and V.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "gpu/kinds.h"

namespace clusterkv::gpu {

// "bf16", "fp16", "fp32".
const char* DTypeName(DType dtype);

// Errors: INVALID_ARGUMENT for any other name.
absl::StatusOr<DType> ParseDType(const std::string& name);

}  // namespace clusterkv::gpu
