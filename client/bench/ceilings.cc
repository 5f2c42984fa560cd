#include "client/bench/ceilings.h"

namespace clusterkv::client::bench {

Floor FloorOf(const Work& work, const Ceilings& ceilings) {
  Floor floor = {.microseconds = 0.0, .ceiling = "none", .bytes = work.device_bytes};
  const auto consider = [&](double amount, double rate, const char* name, double bytes) {
    if (rate <= 0.0 || amount / rate * 1e6 <= floor.microseconds) return;
    floor = {.microseconds = amount / rate * 1e6, .ceiling = name, .bytes = bytes};
  };
  consider(work.device_bytes, ceilings.device_copy, "hbm-copy", work.device_bytes);
  consider(work.to_device_bytes, ceilings.to_device, "h2d", work.to_device_bytes);
  consider(work.to_host_bytes, ceilings.to_host, "d2h", work.to_host_bytes);
  consider(work.flops, ceilings.flops, "flops", work.device_bytes);
  return floor;
}

}  // namespace clusterkv::client::bench
