#include "gpu/cuda/cuda_ipc_memory.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <string>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/cuda/cuda_memory.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::cuda {
namespace {

// A handle opens the whole block that an allocation lies in, and the runtime places small ones in
// one block with others.
constexpr size_t kBlockBytes = 2 << 20;

struct IpcFile {
  std::array<char, 8> magic;
  uint64_t bytes;
  cudaIpcMemHandle_t handle;
};
constexpr std::array<char, 8> kMagic{'c', 'k', 'v', '-', 'i', 'p', 'c', '1'};

absl::StatusOr<UniqueFd> WriteFile(const IpcFile& file) {
  UniqueFd fd(memfd_create("clusterkv-ipc", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, "memfd_create");
  if (pwrite(fd.get(), &file, sizeof(file), 0) != sizeof(file) ||
      fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) != 0) {
    return absl::ErrnoToStatus(errno, "writing a CUDA IPC handle");
  }
  return fd;
}

// Without the magic if it is no such file; a descriptor of the driver's is a device.
IpcFile ReadFile(const UniqueFd& fd) {
  IpcFile file = {};
  struct stat status = {};
  if (fstat(fd.get(), &status) != 0 || !S_ISREG(status.st_mode)) return {};
  return pread(fd.get(), &file, sizeof(file), 0) == sizeof(file) ? file : IpcFile{};
}

class ExportedMemory final : public DeviceMemory {
 public:
  ExportedMemory(int ordinal, void* data, size_t bytes)
      : ordinal_(ordinal), data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  ~ExportedMemory() override {
    const ScopedDevice device(ordinal_);
    (void)cudaFree(data_);
  }
  std::byte* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }
  absl::Status Clear() override { return ZeroDevice(ordinal_, data_, bytes_); }
  absl::StatusOr<UniqueFd> Export() const override {
    const ScopedDevice device(ordinal_);
    IpcFile file{.magic = kMagic, .bytes = bytes_, .handle = {}};
    CKV_RETURN_IF_CUDA_ERROR(cudaIpcGetMemHandle(&file.handle, data_),
                             absl::StrCat("export of ", bytes_, " bytes by a legacy handle"));
    return WriteFile(file);
  }

 private:
  const int ordinal_;
  std::byte* const data_;
  const size_t bytes_;
};

class OpenedMemory final : public DeviceMemory {
 public:
  OpenedMemory(int ordinal, void* data, size_t bytes)
      : ordinal_(ordinal), data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  ~OpenedMemory() override {
    const ScopedDevice device(ordinal_);
    (void)cudaIpcCloseMemHandle(data_);
  }
  std::byte* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }
  absl::Status Clear() override { return ZeroDevice(ordinal_, data_, bytes_); }
  absl::StatusOr<UniqueFd> Export() const override {
    return absl::InvalidArgumentError(
        absl::StrCat("export of ", bytes_, " bytes that another process owns"));
  }

 private:
  const int ordinal_;
  std::byte* const data_;
  const size_t bytes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocateIpc(int ordinal, size_t bytes) {
  if (bytes == 0) return absl::InvalidArgumentError("allocation of 0 bytes");
  const ScopedDevice device(ordinal);
  const size_t whole = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  void* data = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(cudaMalloc(&data, whole),
                           absl::StrCat("allocation of ", bytes, " bytes"));
  auto memory = std::make_unique<ExportedMemory>(ordinal, data, bytes);
  CKV_RETURN_IF_ERROR(ZeroDevice(ordinal, data, whole));
  return memory;
}

bool HoldsIpcHandle(const UniqueFd& fd) { return ReadFile(fd).magic == kMagic; }

absl::StatusOr<std::unique_ptr<DeviceMemory>> ImportIpc(int ordinal, const UniqueFd& fd,
                                                        size_t bytes) {
  const IpcFile file = ReadFile(fd);
  if (bytes == 0 || file.bytes < bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("what was imported has ", file.bytes, " bytes; asked for: ", bytes));
  }
  const ScopedDevice device(ordinal);
  void* data = nullptr;
  const cudaError_t opened =
      cudaIpcOpenMemHandle(&data, file.handle, cudaIpcMemLazyEnablePeerAccess);
  if (opened == cudaErrorDeviceUninitialized) {
    (void)cudaGetLastError();
    return absl::InvalidArgumentError(
        "CUDA: a legacy handle of a process with this one's number cannot be opened: give the two "
        "containers one pid namespace, or use --gpu-sharing vmm");
  }
  CKV_RETURN_IF_CUDA_ERROR(opened, absl::StrCat("import of ", bytes, " bytes by a legacy handle"));
  return std::make_unique<OpenedMemory>(ordinal, data, bytes);
}

}  // namespace clusterkv::gpu::cuda
