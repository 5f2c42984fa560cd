// The parts of /metrics: each adds the families of one subject. deploy/METRICS.md is made of their
// help, and a test checks that it is.
#pragma once

#include "service/daemon_status.h"
#include "service/metric_families.h"

namespace clusterkv::service {

// metrics_cache.cc
void AddCacheMetrics(MetricFamilies& families, const DaemonStatus& status);

// metrics_work.cc
void AddFetchMetrics(MetricFamilies& families, const DaemonStatus& status);
void AddAuditMetrics(MetricFamilies& families, const DaemonStatus& status);
void AddIngestMetrics(MetricFamilies& families, const DaemonStatus& status);
void AddClusteringMetrics(MetricFamilies& families, const DaemonStatus& status);

// metrics_clients.cc
void AddMemoryMetrics(MetricFamilies& families, const DaemonStatus& status);
void AddSessionMetrics(MetricFamilies& families, const DaemonStatus& status);
void AddRpcMetrics(MetricFamilies& families, const DaemonStatus& status);

// process_metrics.cc
void AddProcessMetrics(MetricFamilies& families);

}  // namespace clusterkv::service
