// A trace's tensors where a worker would have them: in the device's memory.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "client/replay/trace.h"
#include "gpu/device.h"

namespace clusterkv::client::replay {

// Immutable after construction.
class DeviceTrace {
 public:
  // Waits for the copies. Errors: RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<DeviceTrace>> Create(gpu::Device& device,
                                                             const Trace& trace);

  // As Trace's tensors of a layer.
  const std::byte* k(size_t layer) const { return layers_[layer].k->data(); }
  const std::byte* v(size_t layer) const { return layers_[layer].v->data(); }
  const std::byte* q(size_t layer) const { return layers_[layer].q->data(); }

 private:
  struct Layer {
    std::unique_ptr<gpu::DeviceMemory> k, v, q;
  };
  std::vector<Layer> layers_;
};

}  // namespace clusterkv::client::replay
