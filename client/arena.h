// Memory of the daemon's device, mapped here.
#pragma once

#include <cstdint>
#include <memory>

#include "gpu/device.h"

namespace clusterkv::client {

struct Arena {
  uint32_t id = 0;
  std::shared_ptr<gpu::DeviceMemory> memory;
};

}  // namespace clusterkv::client
