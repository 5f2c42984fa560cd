// Arrays of device memory, copied to the host.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu {

// `count` values at `source`. Waits for the stream; its errors.
template <typename T>
absl::StatusOr<std::vector<T>> CopyBack(Stream& stream, const std::byte* source, size_t count) {
  std::vector<T> values(count);
  CKV_RETURN_IF_ERROR(stream.CopyAsync(values.data(), source, count * sizeof(T)));
  CKV_RETURN_IF_ERROR(stream.Synchronize());
  return values;
}

}  // namespace clusterkv::gpu
