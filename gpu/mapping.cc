#include "gpu/mapping.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>

#include "absl/strings/str_cat.h"

namespace clusterkv::gpu {

absl::StatusOr<Mapping> Mapping::Create(int fd, size_t bytes, MapAccess access) {
  if (bytes == 0) return absl::InvalidArgumentError("mapping of 0 bytes");
  struct stat status = {};
  if (fstat(fd, &status) != 0) return absl::ErrnoToStatus(errno, "fstat of a mapping's file");
  if (status.st_size < 0 || static_cast<uint64_t>(status.st_size) < bytes) {
    return absl::InvalidArgumentError(absl::StrCat("mapping of ", bytes, " bytes of a file of ",
                                                   static_cast<int64_t>(status.st_size)));
  }
  const int protection = access == MapAccess::kReadOnly ? PROT_READ : PROT_READ | PROT_WRITE;
  void* const data = mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    return absl::ErrnoToStatus(errno, absl::StrCat("mmap of ", bytes, " bytes"));
  }
  return Mapping(static_cast<std::byte*>(data), bytes);
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

}  // namespace clusterkv::gpu
