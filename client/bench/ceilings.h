// What the machine can do, measured in the same run, and the least time that follows for a piece
// of work.
#pragma once

#include <string>

namespace clusterkv::client::bench {

// Bytes and operations a second; 0: not measured.
struct Ceilings {
  double device_copy = 0.0;  // "hbm-copy": read plus written, in device memory
  double to_device = 0.0;    // "h2d": from pinned host memory
  double to_host = 0.0;      // "d2h"
  double flops = 0.0;        // "flops": the product of large matrices
};

// What an operation cannot do without: every byte once, every multiplication and addition.
struct Work {
  double device_bytes = 0.0;
  double to_device_bytes = 0.0;
  double to_host_bytes = 0.0;
  double flops = 0.0;
};

struct Floor {
  double microseconds = 0.0;
  std::string ceiling;  // which of them it is; "none" if none was measured
  double bytes = 0.0;   // that the ceiling moves; of "flops", the device's
};

// The largest of the four quotients: they can overlap, so no sum.
Floor FloorOf(const Work& work, const Ceilings& ceilings);

}  // namespace clusterkv::client::bench
