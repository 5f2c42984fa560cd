// DaemonStatus as JSON, for /status.
#pragma once

#include <string>

#include "service/daemon_status.h"

namespace clusterkv::service {

std::string StatusJson(const DaemonStatus& status);

}  // namespace clusterkv::service
