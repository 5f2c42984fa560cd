// Owns one memory mapping: of a file that is shared, or of anonymous pages.
#pragma once

#include <cstddef>
#include <utility>

#include "absl/status/statusor.h"

namespace clusterkv::gpu {

enum class MapAccess { kReadOnly, kReadWrite };

class Mapping {
 public:
  Mapping() = default;
  // Maps the first `bytes` of `fd`, which stays the caller's.
  // Errors: INVALID_ARGUMENT if the file is shorter (no SIGBUS later); what errno says otherwise.
  static absl::StatusOr<Mapping> Create(int fd, size_t bytes, MapAccess access);
  // Takes over what mmap returned.
  static Mapping Adopt(std::byte* data, size_t bytes) { return Mapping(data, bytes); }

  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  Mapping(std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {}

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace clusterkv::gpu
