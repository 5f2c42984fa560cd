#include "gpu/host/host_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::host {
namespace {

// What the kernel thinks can be taken without swapping; nullopt where it does not say.
std::optional<size_t> AvailableBytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string name, unit;
  size_t kibibytes = 0;
  while (meminfo >> name >> kibibytes) {
    if (name == "MemAvailable:") return kibibytes * 1024;
    std::getline(meminfo, unit);
  }
  return std::nullopt;
}

// Linux would promise any size, and end some process when the pages are touched. A sixteenth is
// left to the others.
absl::Status CheckRoom(size_t bytes) {
  const std::optional<size_t> available = AvailableBytes();
  if (!available || bytes <= *available - *available / 16) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("allocation of ", bytes, " bytes, ", *available, " are available"));
}

absl::Status CheckSize(size_t bytes) {
  if (bytes == 0) return absl::InvalidArgumentError("allocation of 0 bytes");
  if (bytes > static_cast<size_t>(std::numeric_limits<off_t>::max())) {
    return absl::ResourceExhaustedError(absl::StrCat("allocation of ", bytes, " bytes"));
  }
  return CheckRoom(bytes);
}

// Whatever keeps memory from being had is RESOURCE_EXHAUSTED to the caller of an allocation.
absl::Status Exhausted(const char* call, size_t bytes, int error_number) {
  const absl::Status cause = absl::ErrnoToStatus(error_number, call);
  return absl::ResourceExhaustedError(
      absl::StrCat("allocation of ", bytes, " bytes: ", cause.message()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceMemory>> HostMemory::Allocate(size_t bytes) {
  CKV_RETURN_IF_ERROR(CheckSize(bytes));
  void* const data =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return Exhausted("mmap", bytes, errno);
  return std::make_unique<HostMemory>(Mapping::Adopt(static_cast<std::byte*>(data), bytes),
                                      UniqueFd());
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> HostMemory::AllocateShared(size_t bytes) {
  CKV_RETURN_IF_ERROR(CheckSize(bytes));
  UniqueFd fd(memfd_create("clusterkv", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return Exhausted("memfd_create", bytes, errno);
  int error_number = 0;
  do {
    error_number = posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes));
  } while (error_number == EINTR);
  if (error_number != 0) return Exhausted("fallocate", bytes, error_number);
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return absl::ErrnoToStatus(errno, "sealing of shared memory");
  }
  CKV_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Create(fd.get(), bytes, MapAccess::kReadWrite));
  return std::make_unique<HostMemory>(std::move(mapping), std::move(fd));
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> HostMemory::Import(UniqueFd fd, size_t bytes) {
  if (!fd.valid()) return absl::InvalidArgumentError("import of an invalid descriptor");
  CKV_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Create(fd.get(), bytes, MapAccess::kReadWrite));
  return std::make_unique<HostMemory>(std::move(mapping), UniqueFd());
}

absl::Status HostMemory::Clear() {
  std::memset(data(), 0, bytes());
  return absl::OkStatus();
}

absl::StatusOr<UniqueFd> HostMemory::Export() const {
  if (!fd_.valid()) {
    return absl::InvalidArgumentError(
        absl::StrCat("export of ", bytes(), " bytes that were not allocated as shared"));
  }
  UniqueFd copy(fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
  if (!copy.valid()) return absl::ErrnoToStatus(errno, "duplicating a descriptor");
  return copy;
}

}  // namespace clusterkv::gpu::host
