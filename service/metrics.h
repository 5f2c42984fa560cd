// DaemonStatus as Prometheus metrics. Derived from one snapshot at each scrape, so the identities
// hold at every scrape: selected = hit + missed; free + reserved + used + quarantined = the pool.
#pragma once

#include <string>

#include "service/daemon_status.h"

namespace clusterkv::service {

// Text exposition format 0.0.4.
std::string MetricsText(const DaemonStatus& status);

}  // namespace clusterkv::service
