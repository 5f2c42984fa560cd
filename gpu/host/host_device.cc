#include "gpu/host/host_device.h"

#include <sched.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/host/host_memory.h"
#include "gpu/host/host_stream.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::host {
namespace {

constexpr int kMaxThreads = 1024;

int UsableCores() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> HostDevice::Create(int threads) {
  if (threads < 0 || threads > kMaxThreads) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads is ", threads, "; allowed: 0 to ", kMaxThreads));
  }
  const int used = threads == 0 ? UsableCores() : threads;
  try {
    return std::unique_ptr<Device>(new HostDevice(used));
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(absl::StrCat("pool of ", used, " threads: ", error.what()));
  }
}

HostDevice::HostDevice(int threads)
    : description_(absl::StrCat("host CPU, ", threads, threads == 1 ? " thread" : " threads")),
      pool_(threads),
      decode_ops_(pool_),
      cluster_ops_(pool_) {}

absl::StatusOr<std::unique_ptr<Stream>> HostDevice::CreateStream(const std::string& name) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, HostStream::Create(name));
  return stream;
}

absl::StatusOr<std::unique_ptr<Stream>> HostDevice::WrapStream(void* /*native*/) {
  return absl::InvalidArgumentError("the host backend has no streams of the caller's");
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> HostDevice::Allocate(size_t bytes) {
  return HostMemory::Allocate(bytes);
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> HostDevice::AllocateShared(size_t bytes) {
  return HostMemory::AllocateShared(bytes);
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> HostDevice::AllocatePinned(size_t bytes) {
  return HostMemory::Allocate(bytes);
}

absl::StatusOr<std::unique_ptr<HostRegistration>> HostDevice::RegisterHost(std::byte* /*data*/,
                                                                           size_t /*bytes*/,
                                                                           MapAccess /*access*/) {
  return std::make_unique<HostRegistration>();  // the CPU reaches all memory
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> HostDevice::Import(UniqueFd fd, size_t bytes) {
  return HostMemory::Import(std::move(fd), bytes);
}

}  // namespace clusterkv::gpu::host
