// On which NUMA nodes are the GPUs and the memory that this process may use?
#pragma once

#include <string>
#include <vector>

#include "client/ctl/doctor/check.h"
#include "client/ctl/doctor/machine.h"

namespace clusterkv::client::ctl {

// `gpus`: PCI addresses.
Check CheckNuma(const Machine& machine, const std::vector<std::string>& gpus);

}  // namespace clusterkv::client::ctl
