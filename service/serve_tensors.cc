#include "service/serve_tensors.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

constexpr size_t kAlignment = 256;

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The stride from item to item; none if it is not constant, negative, or an address is null.
template <typename AddressOf>
std::optional<size_t> ConstantStride(size_t count, const AddressOf& address_of) {
  const std::byte* const first = address_of(0);
  if (first == nullptr) return std::nullopt;
  if (count == 1) return 0;
  const std::byte* const second = address_of(1);
  if (second <= first) return std::nullopt;
  const auto stride = static_cast<size_t>(second - first);
  for (size_t i = 2; i < count; ++i) {
    if (address_of(i) != first + i * stride) return std::nullopt;
  }
  return stride;
}

// Null unless it lies in an arena: other memory is not the device's.
const std::byte* InArena(const ServePlace::Input& input) {
  return input.in_arena ? input.data : nullptr;
}

absl::Status Copy(gpu::Stream& stream, std::byte* to, const ServePlace::Input& from, size_t bytes) {
  if (from.in_arena) return stream.CopyAsync(to, from.data, bytes);
  std::memcpy(to, from.data, bytes);
  return absl::OkStatus();
}

}  // namespace

absl::Status ServeTensors::Grow(size_t bytes) {
  if (buffer_ != nullptr && buffer_->bytes() >= bytes) return absl::OkStatus();
  CKV_ASSIGN_OR_RETURN(buffer_, device_.AllocatePinned(bytes + bytes / 2));
  return absl::OkStatus();
}

absl::Status ServeTensors::Prepare(gpu::Stream& stream, const gpu::Shape& shape,
                                   std::span<const ServePlace> places) {
  const size_t count = places.size();
  const size_t row = shape.head_dim * gpu::SizeOf(shape.dtype);
  const size_t q_bytes = shape.q_heads * row;
  const size_t kv_bytes = shape.kv_heads * row;
  const size_t out_floats = size_t{shape.q_heads} * shape.head_dim;
  output_bytes_ = (out_floats + shape.q_heads) * sizeof(float);
  const size_t q_offset = 0;
  const size_t token_offset = q_offset + RoundUp(count * q_bytes);
  const size_t out_offset = token_offset + RoundUp(count * 2 * kv_bytes);
  const size_t report_offset = out_offset + RoundUp(count * output_bytes_);
  CKV_RETURN_IF_ERROR(Grow(report_offset + RoundUp(count * sizeof(gpu::LayerReport))));
  std::byte* const base = buffer_->data();
  reports_ = {reinterpret_cast<gpu::LayerReport*>(base + report_offset), count};

  queries_ = {.q = base + q_offset, .batch_stride = q_bytes, .head_stride = row};
  if (const auto stride = ConstantStride(count, [&](size_t i) { return InArena(places[i].q); })) {
    queries_.q = places[0].q.data;
    queries_.batch_stride = *stride;
  } else {
    for (size_t i = 0; i < count; ++i) {
      CKV_RETURN_IF_ERROR(Copy(stream, base + q_offset + i * q_bytes, places[i].q, q_bytes));
    }
  }
  // V must follow K, since the two are also a range that is staged.
  const bool adjoin = std::ranges::all_of(
      places, [&](const ServePlace& place) { return place.v.data == place.k.data + kv_bytes; });
  const auto token_stride =
      adjoin ? ConstantStride(count, [&](size_t i) { return InArena(places[i].k); }) : std::nullopt;
  tokens_ = {.k = base + token_offset, .batch_stride = 2 * kv_bytes, .head_stride = row};
  if (token_stride) {
    tokens_.k = places[0].k.data;
    tokens_.batch_stride = *token_stride;
  } else {
    for (size_t i = 0; i < count; ++i) {
      std::byte* const token = base + token_offset + i * 2 * kv_bytes;
      CKV_RETURN_IF_ERROR(Copy(stream, token, places[i].k, kv_bytes));
      CKV_RETURN_IF_ERROR(Copy(stream, token + kv_bytes, places[i].v, kv_bytes));
    }
  }
  tokens_.v = tokens_.k + kv_bytes;

  const auto out_stride =
      ConstantStride(count, [&](size_t i) -> const std::byte* { return places[i].output; });
  outputs_in_place_ = out_stride && *out_stride % sizeof(float) == 0;
  std::byte* const out = outputs_in_place_ ? places[0].output : base + out_offset;
  const size_t stride = outputs_in_place_ ? *out_stride : output_bytes_;
  target_ = {.out = reinterpret_cast<float*>(out),
             .batch_stride = stride / sizeof(float),
             .head_stride = shape.head_dim,
             .lse = reinterpret_cast<float*>(out) + out_floats,
             .lse_batch_stride = stride / sizeof(float)};
  return absl::OkStatus();
}

absl::Status ServeTensors::ReturnOutputs(gpu::Stream& stream,
                                         std::span<const ServePlace> places) const {
  if (outputs_in_place_) return absl::OkStatus();
  for (size_t i = 0; i < places.size(); ++i) {
    if (places[i].output == nullptr) continue;
    CKV_RETURN_IF_ERROR(stream.CopyAsync(places[i].output, output(i), output_bytes_));
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::service
