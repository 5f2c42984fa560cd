// NVIDIA's container toolkit against its known vulnerabilities.
#pragma once

#include <string>

#include "client/ctl/doctor/check.h"
#include "client/ctl/doctor/machine.h"

namespace clusterkv::client::ctl {

// As its own programs, or the package database, tell: "1.17.8"; empty if it is not here.
std::string ToolkitVersion(const Machine& machine);

Check CheckToolkit(const std::string& version);

}  // namespace clusterkv::client::ctl
