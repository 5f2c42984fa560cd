// Copies K and V rows from wherever the caller has them to a contiguous place, in a stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "gpu/device.h"

namespace clusterkv::client {

// Rows [tokens][heads] of `row_bytes` each. Strides in bytes.
struct StridedRows {
  const std::byte* data = nullptr;
  size_t token_stride = 0;
  size_t head_stride = 0;
  uint32_t tokens = 0;
  uint32_t heads = 0;
  size_t row_bytes = 0;
};

// Thread-compatible.
class KvPacker {
 public:
  explicit KvPacker(gpu::Stream& stream) : stream_(stream) {}

  // As few copies as the strides allow. A stream's queue is bounded: now and then this waits for
  // it, and then reports its errors.
  absl::Status Pack(std::byte* destination, const StridedRows& rows);
  absl::Status Copy(void* destination, const void* source, size_t bytes);

 private:
  gpu::Stream& stream_;
  uint32_t enqueued_ = 0;  // copies since the stream was last waited for
};

}  // namespace clusterkv::client
