#include "service/metrics.h"

#include <prometheus/text_serializer.h>

#include "service/metric_families.h"
#include "service/metric_sections.h"

namespace clusterkv::service {
namespace {

void AddHealth(MetricFamilies& families, const DaemonStatus& status) {
  families.Gauge("clusterkv_ready", "1 if the daemon takes new work, else 0.",
                 status.ready ? 1.0 : 0.0);
  families.Gauge("clusterkv_draining", "1 after a signal to stop, else 0.",
                 status.draining ? 1.0 : 0.0);
  families.Gauge("clusterkv_device_plugin_registered",
                 "1 if the kubelet knows and watches the device plugin, else 0.",
                 status.device_plugin_registered ? 1.0 : 0.0);
  families.Gauge("clusterkv_uptime_seconds", "Time since the start.", status.uptime_seconds);
  families.Gauge("clusterkv_device_age_seconds",
                 "Time since the device last answered a probe, of which there is one a second.",
                 status.device_age_seconds);
  families.Gauge("clusterkv_tick_age_seconds",
                 "Time since the core last did its housekeeping, once a second.",
                 status.tick_age_seconds);
  const auto each = [&](auto add) {
    for (const ThreadStatus& thread : status.threads)
      add(thread, MetricLabels{{"thread", thread.name}});
  };
  each([&](const ThreadStatus& thread, const MetricLabels& labels) {
    families.Gauge("clusterkv_thread_task_age_seconds",
                   "Time since the task that the thread runs began; 0 while it has none.",
                   thread.task_age_seconds, labels);
  });
  each([&](const ThreadStatus& thread, const MetricLabels& labels) {
    families.Gauge("clusterkv_thread_waiting_tasks", "Tasks that wait for the thread.",
                   thread.waiting, labels);
  });
  each([&](const ThreadStatus& thread, const MetricLabels& labels) {
    families.Counter("clusterkv_thread_tasks_total", "Tasks that the thread has done.",
                     thread.tasks, labels);
  });
  each([&](const ThreadStatus& thread, const MetricLabels& labels) {
    families.Counter("clusterkv_thread_busy_seconds_total",
                     "Time the thread spent in tasks, the one that runs among them.",
                     thread.busy_seconds, labels);
  });
  families.Gauge("clusterkv_build_info", "Always 1; the labels tell the build.", 1.0,
                 {{"version", status.version}, {"backend", status.backend}});
}

}  // namespace

std::string MetricsText(const DaemonStatus& status) {
  MetricFamilies families;
  AddCacheMetrics(families, status);
  AddFetchMetrics(families, status);
  AddAuditMetrics(families, status);
  AddIngestMetrics(families, status);
  AddClusteringMetrics(families, status);
  AddMemoryMetrics(families, status);
  AddSessionMetrics(families, status);
  AddRpcMetrics(families, status);
  AddHealth(families, status);
  AddProcessMetrics(families);
  return prometheus::TextSerializer().Serialize(families.all());
}

}  // namespace clusterkv::service
