// Can a daemon and its workers use the GPUs together?
#pragma once

#include "client/ctl/doctor/check.h"
#include "client/ctl/doctor/driver_probe.h"

namespace clusterkv::client::ctl {

// One check for all GPUs: the worst decides, and each that is wrong is named.
Check CheckGpuSharing(const DriverFacts& driver, bool mps_running);

}  // namespace clusterkv::client::ctl
