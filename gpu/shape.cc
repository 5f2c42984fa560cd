#include "gpu/shape.h"

#include "absl/strings/str_cat.h"

namespace clusterkv::gpu {
namespace {

constexpr uint32_t kMaxLayers = 1024;
constexpr uint32_t kMaxKvHeads = 1024;
constexpr uint32_t kMaxGroupSize = 16;

}  // namespace

absl::Status Shape::Validate() const {
  if (layers < 1 || layers > kMaxLayers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layers is ", layers, "; allowed: 1 to ", kMaxLayers));
  }
  if (kv_heads < 1 || kv_heads > kMaxKvHeads) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv_heads is ", kv_heads, "; allowed: 1 to ", kMaxKvHeads));
  }
  if (q_heads < kv_heads || q_heads % kv_heads != 0 || q_heads / kv_heads > kMaxGroupSize) {
    return absl::InvalidArgumentError(absl::StrCat("q_heads is ", q_heads, "; allowed: kv_heads (",
                                                   kv_heads, ") times 1 to ", kMaxGroupSize));
  }
  if (head_dim != 64 && head_dim != 96 && head_dim != 128 && head_dim != 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim is ", head_dim, "; allowed: 64, 96, 128, 256"));
  }
  if (dtype != DType::kBf16 && dtype != DType::kFp16 && dtype != DType::kFp32) {
    return absl::InvalidArgumentError(absl::StrCat("dtype is ", static_cast<uint32_t>(dtype),
                                                   "; allowed: 1 (bf16), 2 (fp16), 3 (fp32)"));
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::gpu
