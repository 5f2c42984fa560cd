#include "gpu/cuda/cuda_memory.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::cuda {
namespace {

std::string Allocation(size_t bytes) { return absl::StrCat("allocation of ", bytes, " bytes"); }

absl::Status CheckSize(size_t bytes) {
  if (bytes == 0) return absl::InvalidArgumentError("allocation of 0 bytes");
  return absl::OkStatus();
}

absl::Status NotShared(size_t bytes) {
  return absl::InvalidArgumentError(
      absl::StrCat("export of ", bytes, " bytes that were not allocated as shared"));
}

// What the runtime allocated and frees: device memory, or pinned host memory.
class RuntimeMemory final : public DeviceMemory {
 public:
  using Free = cudaError_t (*)(void*);

  RuntimeMemory(int ordinal, Free free, void* data, size_t bytes)
      : ordinal_(ordinal), free_(free), data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  ~RuntimeMemory() override {
    const ScopedDevice device(ordinal_);
    (void)free_(data_);
  }
  std::byte* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }
  // cudaMemset also takes pinned host memory.
  absl::Status Clear() override { return ZeroDevice(ordinal_, data_, bytes_); }
  absl::StatusOr<UniqueFd> Export() const override { return NotShared(bytes_); }

 private:
  const int ordinal_;
  const Free free_;
  std::byte* const data_;
  const size_t bytes_;
};

// Owns what it has reached so far, so that a failure on the way leaks nothing.
class VirtualMemory final : public DeviceMemory {
 public:
  VirtualMemory(const CudaDriver& driver, int ordinal, size_t bytes)
      : driver_(driver), ordinal_(ordinal), bytes_(bytes) {}
  ~VirtualMemory() override {
    const ScopedDevice device(ordinal_);
    if (mapped_) (void)driver_.mem_unmap(address_, reserved_);
    if (address_ != 0) (void)driver_.address_free(address_, reserved_);
    if (created_) (void)driver_.mem_release(handle_);
  }

  absl::Status Allocate() {
    const ScopedDevice device(ordinal_);
    CUmemAllocationProp properties = Properties();
    CKV_RETURN_IF_ERROR(RoundUp(properties));
    CKV_RETURN_IF_CUDA_ERROR(driver_.mem_create(&handle_, reserved_, &properties, 0),
                             Allocation(bytes_));
    created_ = true;
    exportable_ = true;
    CKV_RETURN_IF_ERROR(Map());
    // The driver scrubs memory of other processes, but does not promise zeros.
    return ZeroDevice(ordinal_, data(), reserved_);
  }

  absl::Status Import(const UniqueFd& fd) {
    const ScopedDevice device(ordinal_);
    CUmemAllocationProp properties = Properties();
    CKV_RETURN_IF_ERROR(RoundUp(properties));
    CKV_RETURN_IF_CUDA_ERROR(
        driver_.import_handle(&handle_, reinterpret_cast<void*>(static_cast<intptr_t>(fd.get())),
                              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        absl::StrCat("import of ", bytes_, " bytes"));
    created_ = true;
    const absl::Status mapped = Map();
    if (!absl::IsInternal(mapped)) return mapped;
    return absl::InvalidArgumentError(
        absl::StrCat("what was imported is shorter than ", bytes_, " bytes: ", mapped.message()));
  }

  std::byte* data() const override { return reinterpret_cast<std::byte*>(address_); }
  size_t bytes() const override { return bytes_; }

  absl::Status Clear() override { return ZeroDevice(ordinal_, data(), bytes_); }

  absl::StatusOr<UniqueFd> Export() const override {
    if (!exportable_) return NotShared(bytes_);
    const ScopedDevice device(ordinal_);
    int fd = -1;
    CKV_RETURN_IF_CUDA_ERROR(
        driver_.export_handle(&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
        absl::StrCat("export of ", bytes_, " bytes"));
    UniqueFd owned(fd);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
      return absl::ErrnoToStatus(errno, "closing an exported descriptor on exec");
    }
    return owned;
  }

 private:
  CUmemAllocationProp Properties() const {
    CUmemAllocationProp properties = {};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal_};
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    return properties;
  }

  absl::Status RoundUp(const CUmemAllocationProp& properties) {
    size_t granularity = 0;
    CKV_RETURN_IF_CUDA_ERROR(
        driver_.granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
        Allocation(bytes_));
    reserved_ = (bytes_ + granularity - 1) / granularity * granularity;
    return absl::OkStatus();
  }

  absl::Status Map() {
    const std::string what = absl::StrCat("mapping of ", bytes_, " bytes");
    CKV_RETURN_IF_CUDA_ERROR(driver_.address_reserve(&address_, reserved_, 0, 0, 0), what);
    CKV_RETURN_IF_CUDA_ERROR(driver_.mem_map(address_, reserved_, 0, handle_, 0), what);
    mapped_ = true;
    const CUmemAccessDesc access = {
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal_},
        .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CKV_RETURN_IF_CUDA_ERROR(driver_.set_access(address_, reserved_, &access, 1), what);
    return absl::OkStatus();
  }

  const CudaDriver& driver_;
  const int ordinal_;
  const size_t bytes_;
  size_t reserved_ = 0;  // bytes_, rounded up
  CUmemGenericAllocationHandle handle_ = 0;
  CUdeviceptr address_ = 0;
  bool created_ = false;
  bool mapped_ = false;
  bool exportable_ = false;
};

class CudaHostRegistration final : public HostRegistration {
 public:
  CudaHostRegistration(int ordinal, std::byte* data) : ordinal_(ordinal), data_(data) {}
  ~CudaHostRegistration() override {
    const ScopedDevice device(ordinal_);
    (void)cudaHostUnregister(data_);
  }

 private:
  const int ordinal_;
  std::byte* const data_;
};

}  // namespace

ScopedDevice::ScopedDevice(int ordinal) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current == ordinal) return;
  if (cudaSetDevice(ordinal) == cudaSuccess) previous_ = current;
}

ScopedDevice::~ScopedDevice() {
  if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

absl::Status ZeroDevice(int ordinal, void* data, size_t bytes) {
  const ScopedDevice device(ordinal);
  const std::string what = absl::StrCat("zeroing of ", bytes, " bytes");
  CKV_RETURN_IF_CUDA_ERROR(cudaMemset(data, 0, bytes), what);
  CKV_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(nullptr), what);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocatePrivate(int ordinal, size_t bytes) {
  CKV_RETURN_IF_ERROR(CheckSize(bytes));
  const ScopedDevice device(ordinal);
  void* data = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(cudaMalloc(&data, bytes), Allocation(bytes));
  auto memory = std::make_unique<RuntimeMemory>(ordinal, cudaFree, data, bytes);
  CKV_RETURN_IF_ERROR(ZeroDevice(ordinal, data, bytes));
  return memory;
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocatePinnedHost(int ordinal, size_t bytes) {
  CKV_RETURN_IF_ERROR(CheckSize(bytes));
  const ScopedDevice device(ordinal);
  void* data = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable),
                           Allocation(bytes));
  std::fill_n(static_cast<std::byte*>(data), bytes, std::byte{0});
  return std::make_unique<RuntimeMemory>(ordinal, cudaFreeHost, data, bytes);
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocateVirtual(const CudaDriver& driver, int ordinal,
                                                              size_t bytes) {
  CKV_RETURN_IF_ERROR(CheckSize(bytes));
  auto memory = std::make_unique<VirtualMemory>(driver, ordinal, bytes);
  CKV_RETURN_IF_ERROR(memory->Allocate());
  return memory;
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> ImportVirtual(const CudaDriver& driver, int ordinal,
                                                            UniqueFd fd, size_t bytes) {
  CKV_RETURN_IF_ERROR(CheckSize(bytes));
  if (!fd.valid()) return absl::InvalidArgumentError("import of an invalid descriptor");
  auto memory = std::make_unique<VirtualMemory>(driver, ordinal, bytes);
  CKV_RETURN_IF_ERROR(memory->Import(fd));
  return memory;
}

absl::StatusOr<std::unique_ptr<HostRegistration>> RegisterHostMemory(int ordinal, std::byte* data,
                                                                     size_t bytes,
                                                                     MapAccess access) {
  const ScopedDevice device(ordinal);
  unsigned flags = cudaHostRegisterMapped | cudaHostRegisterPortable;
  if (access == MapAccess::kReadOnly) flags |= cudaHostRegisterReadOnly;
  CKV_RETURN_IF_CUDA_ERROR(cudaHostRegister(data, bytes, flags),
                           absl::StrCat("pinning of ", bytes, " bytes of host memory"));
  auto registration = std::make_unique<CudaHostRegistration>(ordinal, data);
  void* address = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(cudaHostGetDevicePointer(&address, data, 0),
                           absl::StrCat("pinning of ", bytes, " bytes of host memory"));
  if (address != data) {
    return absl::UnavailableError(
        "CUDA: this device reaches pinned host memory only at another "
        "address than the host's");
  }
  return registration;
}

}  // namespace clusterkv::gpu::cuda
