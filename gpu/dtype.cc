#include "gpu/dtype.h"

#include "absl/strings/str_cat.h"

namespace clusterkv::gpu {

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return "bf16";
    case DType::kFp16:
      return "fp16";
    case DType::kFp32:
      return "fp32";
  }
  return "unknown";
}

absl::StatusOr<DType> ParseDType(const std::string& name) {
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("dtype is \"", name, "\"; allowed: bf16, fp16, fp32"));
}

}  // namespace clusterkv::gpu
