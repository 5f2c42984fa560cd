// The `cuda` backend: one GPU, by CUDA's runtime and the driver's virtual memory. gpu/README.md
// says which thread calls what.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "absl/status/statusor.h"
#include "gpu/cuda/cuda_cluster_ops.h"
#include "gpu/cuda/cuda_decode_ops.h"
#include "gpu/cuda/cuda_driver.h"
#include "gpu/device.h"

namespace clusterkv::gpu::cuda {

// Must outlive its streams and memory.
class CudaDevice final : public Device {
 public:
  // device: an index, or a UUID as nvidia-smi prints it; empty: the first.
  // Errors: UNAVAILABLE (no driver, no device, too old), INVALID_ARGUMENT (no such device).
  static absl::StatusOr<std::unique_ptr<Device>> Create(const std::string& device,
                                                        std::optional<GpuSharing> sharing);

  const std::string& backend() const override { return backend_; }
  const std::string& description() const override { return description_; }
  const std::string& uuid() const override { return uuid_; }
  std::optional<int> numa_node() const override { return numa_node_; }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream(const std::string& name) override;
  absl::StatusOr<std::unique_ptr<Stream>> WrapStream(void* native) override;
  absl::StatusOr<std::unique_ptr<DeviceMemory>> Allocate(size_t bytes) override;
  absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocateShared(size_t bytes) override;
  absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocatePinned(size_t bytes) override;
  absl::StatusOr<std::unique_ptr<DeviceMemory>> Import(UniqueFd fd, size_t bytes) override;
  absl::StatusOr<std::unique_ptr<HostRegistration>> RegisterHost(std::byte* data, size_t bytes,
                                                                 MapAccess access) override;
  bool counts_importers() const override { return sharing_ == GpuSharing::kVmm; }
  bool computes_on_host_memory() const override { return false; }
  DecodeOps& decode_ops() override { return decode_ops_; }
  ClusterOps& cluster_ops() override { return cluster_ops_; }

 private:
  CudaDevice(int ordinal, cudaMemPool_t pool, std::string description, std::string uuid,
             std::optional<int> numa_node, GpuSharing sharing, absl::StatusOr<CudaDriver> driver)
      : ordinal_(ordinal),
        description_(std::move(description)),
        uuid_(std::move(uuid)),
        numa_node_(numa_node),
        sharing_(sharing),
        driver_(std::move(driver)),
        pool_(pool) {}

  const std::string backend_ = "cuda";
  const int ordinal_;
  const std::string description_;
  const std::string uuid_;
  const std::optional<int> numa_node_;
  const GpuSharing sharing_;
  const absl::StatusOr<CudaDriver> driver_;  // of virtual memory
  struct PoolDeleter {
    void operator()(cudaMemPool_t pool) const;
  };
  const std::unique_ptr<std::remove_pointer_t<cudaMemPool_t>, PoolDeleter> pool_;
  CudaDecodeOps decode_ops_;
  CudaClusterOps cluster_ops_;
};

}  // namespace clusterkv::gpu::cuda
