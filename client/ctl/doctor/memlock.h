// May the daemon lock the memory that it pins?
#pragma once

#include <cstdint>
#include <string>

#include "client/ctl/doctor/check.h"

namespace clusterkv::client::ctl {

// `limits`: text of /proc/PID/limits; `whose`: for the finding. `bytes`: of the pool, 0 if nobody
// knows. The driver pins without the limit on most machines, so too low a one is a warning.
Check CheckMemlock(const std::string& limits, const std::string& whose, uint64_t bytes,
                   bool has_gpu);

}  // namespace clusterkv::client::ctl
