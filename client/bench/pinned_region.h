// Host memory as the daemon's host store has it: mapped pages, touched by many threads at once,
// then made known to the device.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/host/thread_pool.h"
#include "gpu/mapping.h"

namespace clusterkv::client::bench {

class PinnedRegion {
 public:
  // Zeroed. Errors: RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<PinnedRegion>> Create(gpu::Device& device,
                                                              gpu::host::ThreadPool& threads,
                                                              size_t bytes);

  std::byte* data() const { return mapping_.data(); }
  size_t bytes() const { return mapping_.bytes(); }

 private:
  explicit PinnedRegion(gpu::Mapping mapping) : mapping_(std::move(mapping)) {}

  const gpu::Mapping mapping_;
  std::unique_ptr<gpu::HostRegistration> registration_;  // goes first
};

}  // namespace clusterkv::client::bench
