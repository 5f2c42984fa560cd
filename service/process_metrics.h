// What the daemon's process uses, as the kernel counts it.
#pragma once

#include <cstdint>

namespace clusterkv::service {

struct ProcessUse {
  double cpu_seconds = 0;  // user + system
  uint64_t resident_bytes = 0, virtual_bytes = 0;
  uint64_t open_fds = 0, max_fds = 0;
  uint64_t threads = 0;
  double start_seconds = 0;  // since the epoch
};

// What cannot be read stays 0.
ProcessUse ReadProcessUse();

}  // namespace clusterkv::service
