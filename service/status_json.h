// What the admin port tells as JSON.
#pragma once

#include <string>
#include <vector>

#include "service/core_types.h"
#include "service/daemon_status.h"
#include "service/recent_errors.h"

namespace clusterkv::service {

// Of /status: as clusterkvctl status prints it.
std::string StatusJson(const DaemonStatus& status, const std::vector<RecentError>& recent_errors);
// Of /sequences: as clusterkvctl sequences prints them.
std::string SequencesJson(uint64_t boot_epoch, const std::vector<SequenceStatus>& sequences);

}  // namespace clusterkv::service
