#include "client/c/tensors.h"

#include <initializer_list>

#include "absl/strings/str_cat.h"
#include "client/c/arguments.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::c {
namespace {

struct Tensor {
  const char* name;
  const void* data;
  std::initializer_list<size_t> strides;
};

// May be null.
absl::Status CheckAligned(const Tensor& tensor, size_t element_bytes) {
  if (reinterpret_cast<uintptr_t>(tensor.data) % element_bytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        tensor.name, " is not at a multiple of its element size, ", element_bytes, " bytes"));
  }
  for (const size_t stride : tensor.strides) {
    if (stride % element_bytes == 0) continue;
    return absl::InvalidArgumentError(absl::StrCat("a stride of ", tensor.name, " is ", stride,
                                                   " bytes; allowed: multiples of ", element_bytes,
                                                   ", its element size"));
  }
  return absl::OkStatus();
}

absl::Status Check(const Tensor& tensor, size_t element_bytes) {
  CKV_RETURN_IF_ERROR(CheckNotNull(tensor.data, tensor.name));
  return CheckAligned(tensor, element_bytes);
}

size_t Stride(size_t given, size_t packed) { return given != 0 ? given : packed; }

}  // namespace

absl::StatusOr<gpu::KvSource> ReadKv(const clusterkv_kv* kv, const gpu::Shape& shape,
                                     uint32_t tokens) {
  CKV_ASSIGN_OR_RETURN(const clusterkv_kv given, ReadStruct(kv, CLUSTERKV_KV_INIT));
  const size_t element = gpu::SizeOf(shape.dtype);
  const auto strides = {given.batch_stride, given.layer_stride, given.token_stride,
                        given.head_stride};
  CKV_RETURN_IF_ERROR(Check({"k", given.k, strides}, element));
  CKV_RETURN_IF_ERROR(Check({"v", given.v, strides}, element));
  const size_t head_bytes = shape.head_dim * element;
  const size_t token_bytes = shape.kv_heads * head_bytes;
  return gpu::KvSource{.k = static_cast<const std::byte*>(given.k),
                       .v = static_cast<const std::byte*>(given.v),
                       .batch_stride = Stride(given.batch_stride, token_bytes),
                       .layer_stride = Stride(given.layer_stride, tokens * token_bytes),
                       .token_stride = Stride(given.token_stride, token_bytes),
                       .head_stride = Stride(given.head_stride, head_bytes)};
}

absl::StatusOr<Attention> ReadAttention(const clusterkv_attention* attention,
                                        const gpu::Shape& shape) {
  CKV_ASSIGN_OR_RETURN(const clusterkv_attention given,
                       ReadStruct(attention, CLUSTERKV_ATTENTION_INIT));
  const size_t element = gpu::SizeOf(shape.dtype);
  constexpr size_t kFloat = sizeof(float);
  CKV_RETURN_IF_ERROR(Check({"q", given.q, {given.q_batch_stride, given.q_head_stride}}, element));
  CKV_RETURN_IF_ERROR(
      Check({"out", given.out, {given.out_batch_stride, given.out_head_stride}}, kFloat));
  CKV_RETURN_IF_ERROR(CheckAligned({"lse", given.lse, {given.lse_batch_stride}}, kFloat));
  const size_t dim = shape.head_dim;
  const size_t heads = shape.q_heads;
  // Of outputs the client counts in floats.
  return Attention{.queries = {.q = static_cast<const std::byte*>(given.q),
                               .batch_stride = Stride(given.q_batch_stride, heads * dim * element),
                               .head_stride = Stride(given.q_head_stride, dim * element)},
                   .target = {.out = given.out,
                              .batch_stride = Stride(given.out_batch_stride / kFloat, heads * dim),
                              .head_stride = Stride(given.out_head_stride / kFloat, dim),
                              .lse = given.lse,
                              .lse_batch_stride = Stride(given.lse_batch_stride / kFloat, heads)}};
}

}  // namespace clusterkv::client::c
