#include "gpu/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/cuda/cuda_ipc_memory.h"
#include "gpu/cuda/cuda_memory.h"
#include "gpu/cuda/cuda_stream.h"
#include "gpu/numa_nodes.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::cuda {
namespace {

// mma.sync of bf16, cp.async.
constexpr int kLeastMajor = 8;

std::string UuidOf(const cudaDeviceProp& properties) {
  std::string uuid = "GPU-";
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) uuid += '-';
    absl::StrAppendFormat(&uuid, "%02x", static_cast<unsigned char>(properties.uuid.bytes[i]));
  }
  return uuid;
}

absl::StatusOr<int> FindDevice(const std::string& wanted, int count) {
  if (wanted.empty()) return 0;
  int index = 0;
  if (absl::SimpleAtoi(wanted, &index)) {
    if (index >= 0 && index < count) return index;
    return absl::InvalidArgumentError(
        absl::StrCat("device ", index, "; allowed: below ", count, ", or a UUID"));
  }
  std::string known;
  for (index = 0; index < count; ++index) {
    cudaDeviceProp properties = {};
    CKV_RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, index), "reading properties");
    const std::string uuid = UuidOf(properties);
    if (uuid == wanted) return index;
    absl::StrAppend(&known, " ", uuid);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("device \"", wanted, "\" is not there; these are:", known));
}

// Temporaries of a few bytes a call must not go to the driver and back; k-means' hundreds of MiB
// must.
constexpr uint64_t kKeptPoolBytes = 32 << 20;

absl::StatusOr<cudaMemPool_t> CreatePool(int ordinal) {
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location = {.type = cudaMemLocationTypeDevice, .id = ordinal};
  cudaMemPool_t pool = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(cudaMemPoolCreate(&pool, &properties), "making a pool");
  uint64_t kept = kKeptPoolBytes;
  const cudaError_t set = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept);
  if (set == cudaSuccess) return pool;
  (void)cudaMemPoolDestroy(pool);
  return ToStatus(set, "making a pool");
}

}  // namespace

void CudaDevice::PoolDeleter::operator()(cudaMemPool_t pool) const {
  (void)cudaMemPoolDestroy(pool);
}

absl::StatusOr<std::unique_ptr<Device>> CudaDevice::Create(const std::string& device,
                                                           std::optional<GpuSharing> sharing) {
  int count = 0;
  CKV_RETURN_IF_CUDA_ERROR(cudaGetDeviceCount(&count), "looking for devices");
  if (count == 0) return absl::UnavailableError("CUDA: there is no device");
  CKV_ASSIGN_OR_RETURN(const int ordinal, FindDevice(device, count));
  cudaDeviceProp properties = {};
  CKV_RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, ordinal), "reading properties");
  if (properties.major < kLeastMajor) {
    return absl::UnavailableError(
        absl::StrCat("CUDA: ", properties.name, " has compute capability ", properties.major, ".",
                     properties.minor, "; needed: ", kLeastMajor, ".0 or later"));
  }
  std::array<char, 32> address{};  // "0000:1B:00.0"
  CKV_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetPCIBusId(address.data(), static_cast<int>(address.size()), ordinal),
      "reading its address");
  absl::StatusOr<CudaDriver> driver = CudaDriver::Load();
  if (sharing == GpuSharing::kVmm) CKV_RETURN_IF_ERROR(driver.status());
  const ScopedDevice current(ordinal);
  CKV_RETURN_IF_CUDA_ERROR(cudaFree(nullptr), "making a context");
  CKV_ASSIGN_OR_RETURN(const cudaMemPool_t pool, CreatePool(ordinal));
  return std::unique_ptr<Device>(new CudaDevice(
      ordinal, pool,
      absl::StrCat(properties.name, ", ", UuidOf(properties), ", ", properties.totalGlobalMem >> 20,
                   " MiB, ", properties.multiProcessorCount, " multiprocessors"),
      UuidOf(properties), NodeOfPciDevice(address.data()), sharing.value_or(GpuSharing::kVmm),
      std::move(driver)));
}

absl::StatusOr<std::unique_ptr<Stream>> CudaDevice::CreateStream(const std::string& name) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream,
                       CudaStream::Create(ordinal_, pool_.get(), name));
  return stream;
}

absl::StatusOr<std::unique_ptr<Stream>> CudaDevice::WrapStream(void* native) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream,
                       CudaStream::Wrap(ordinal_, pool_.get(), static_cast<cudaStream_t>(native)));
  return stream;
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> CudaDevice::Allocate(size_t bytes) {
  return AllocatePrivate(ordinal_, bytes);
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> CudaDevice::AllocateShared(size_t bytes) {
  if (sharing_ == GpuSharing::kLegacy) return AllocateIpc(ordinal_, bytes);
  CKV_RETURN_IF_ERROR(driver_.status());
  return AllocateVirtual(*driver_, ordinal_, bytes);
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> CudaDevice::AllocatePinned(size_t bytes) {
  return AllocatePinnedHost(ordinal_, bytes);
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> CudaDevice::Import(UniqueFd fd, size_t bytes) {
  if (HoldsIpcHandle(fd)) return ImportIpc(ordinal_, fd, bytes);
  CKV_RETURN_IF_ERROR(driver_.status());
  return ImportVirtual(*driver_, ordinal_, std::move(fd), bytes);
}

absl::StatusOr<std::unique_ptr<HostRegistration>> CudaDevice::RegisterHost(std::byte* data,
                                                                           size_t bytes,
                                                                           MapAccess access) {
  return RegisterHostMemory(ordinal_, data, bytes, access);
}

}  // namespace clusterkv::gpu::cuda
