// The `host` backend: every operation on the CPU, over memory that processes can share.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/host/host_cluster_ops.h"
#include "gpu/host/host_decode_ops.h"
#include "gpu/host/thread_pool.h"

namespace clusterkv::gpu::host {

// Must outlive its streams.
class HostDevice final : public Device {
 public:
  // threads: 0 = all cores this process may use. Errors: INVALID_ARGUMENT outside 0..1024.
  static absl::StatusOr<std::unique_ptr<Device>> Create(int threads);

  const std::string& backend() const override { return backend_; }
  const std::string& description() const override { return description_; }
  const std::string& uuid() const override { return uuid_; }
  std::optional<int> numa_node() const override { return std::nullopt; }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream(const std::string& name) override;
  absl::StatusOr<std::unique_ptr<Stream>> WrapStream(void* native) override;
  absl::StatusOr<std::unique_ptr<DeviceMemory>> Allocate(size_t bytes) override;
  absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocateShared(size_t bytes) override;
  absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocatePinned(size_t bytes) override;
  absl::StatusOr<std::unique_ptr<HostRegistration>> RegisterHost(std::byte* data, size_t bytes,
                                                                 MapAccess access) override;
  bool counts_importers() const override { return true; }
  bool computes_on_host_memory() const override { return true; }
  absl::StatusOr<std::unique_ptr<DeviceMemory>> Import(UniqueFd fd, size_t bytes) override;
  DecodeOps& decode_ops() override { return decode_ops_; }
  ClusterOps& cluster_ops() override { return cluster_ops_; }

 private:
  explicit HostDevice(int threads);

  const std::string backend_ = "host";
  const std::string uuid_;
  const std::string description_;
  ThreadPool pool_;
  HostDecodeOps decode_ops_;
  HostClusterOps cluster_ops_;
};

}  // namespace clusterkv::gpu::host
