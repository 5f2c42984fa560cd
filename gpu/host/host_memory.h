// Memory of the host backend: private pages, or a sealed memfd that other processes map.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/mapping.h"
#include "gpu/unique_fd.h"

namespace clusterkv::gpu::host {

// Thread-safe, but for Clear; what the bytes hold is the users' affair.
class HostMemory final : public DeviceMemory {
 public:
  // Zeroed and private to this process; pages come with their first use.
  static absl::StatusOr<std::unique_ptr<DeviceMemory>> Allocate(size_t bytes);
  // Zeroed, all pages there (no SIGBUS when memory runs short later), and sealed against a change
  // of size: no holder of the descriptor can cut it short under another.
  static absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocateShared(size_t bytes);
  // Takes the descriptor of another process's shared memory. Not exportable again.
  static absl::StatusOr<std::unique_ptr<DeviceMemory>> Import(UniqueFd fd, size_t bytes);

  HostMemory(Mapping mapping, UniqueFd fd) : mapping_(std::move(mapping)), fd_(std::move(fd)) {}

  std::byte* data() const override { return mapping_.data(); }
  size_t bytes() const override { return mapping_.bytes(); }
  absl::Status Clear() override;
  absl::StatusOr<UniqueFd> Export() const override;

 private:
  const Mapping mapping_;
  const UniqueFd fd_;  // invalid unless exportable
};

}  // namespace clusterkv::gpu::host
