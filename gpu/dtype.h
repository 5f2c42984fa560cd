// Storage types of K and V. Arithmetic is always fp32, whatever the storage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace clusterkv::gpu {

enum class DType : uint32_t { kBf16 = 1, kFp16 = 2, kFp32 = 3 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kFp32 ? 4 : 2; }

// "bf16", "fp16", "fp32".
const char* DTypeName(DType dtype);

// Errors: INVALID_ARGUMENT for any other name.
absl::StatusOr<DType> ParseDType(const std::string& name);

}  // namespace clusterkv::gpu
