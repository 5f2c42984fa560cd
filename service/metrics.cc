#include "service/metrics.h"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <map>
#include <utility>
#include <vector>

#include "service/process_metrics.h"

namespace clusterkv::service {
namespace {

using Labels = std::map<std::string, std::string>;
using prometheus::MetricFamily;
using prometheus::MetricType;

class Families {
 public:
  void Add(const std::string& name, MetricType type, const std::string& help, double value,
           const Labels& labels = {}) {
    if (families_.empty() || families_.back().name != name) {
      families_.push_back({.name = name, .help = help, .type = type, .metric = {}});
    }
    prometheus::ClientMetric metric;
    for (const auto& [label, text] : labels) metric.label.push_back({label, text});
    if (type == MetricType::Counter) metric.counter.value = value;
    if (type == MetricType::Gauge) metric.gauge.value = value;
    families_.back().metric.push_back(std::move(metric));
  }
  void Counter(const std::string& name, const std::string& help, uint64_t value,
               const Labels& labels = {}) {
    Add(name, MetricType::Counter, help, static_cast<double>(value), labels);
  }
  void Gauge(const std::string& name, const std::string& help, uint64_t value,
             const Labels& labels = {}) {
    Add(name, MetricType::Gauge, help, static_cast<double>(value), labels);
  }
  void Seconds(const std::string& name, const std::string& help, double value) {
    Add(name, MetricType::Gauge, help, value, {});
  }
  const std::vector<MetricFamily>& all() const { return families_; }

 private:
  std::vector<MetricFamily> families_;
};

struct CacheUnit {
  const char* name;
  uint64_t CacheCounters::*hit;
  uint64_t CacheCounters::*missed;
};

void AddCache(Families& families, const DaemonStatus& status) {
  const CacheUnit units[] = {
      {"clusters", &CacheCounters::hit_clusters, &CacheCounters::missed_clusters},
      {"tokens", &CacheCounters::hit_tokens, &CacheCounters::missed_tokens},
      {"bytes", &CacheCounters::hit_bytes, &CacheCounters::missed_bytes}};
  const std::pair<const char*, const CacheCounters*> modes[] = {{"direct", &status.direct},
                                                                {"served", &status.served}};
  for (const CacheUnit& unit : units) {
    const std::string prefix = std::string("clusterkv_cache_") + unit.name;
    const std::string what = std::string(unit.name) + " of selected clusters";
    for (const auto& [mode, counters] : modes) {
      families.Counter(prefix + "_selected_total", what + ": hit + missed.",
                       counters->*unit.hit + counters->*unit.missed,
                       {{"gpu", status.backend}, {"mode", mode}});
    }
    for (const auto& [mode, counters] : modes) {
      families.Counter(prefix + "_hit_total", what + " found in the cluster cache.",
                       counters->*unit.hit, {{"gpu", status.backend}, {"mode", mode}});
    }
    for (const auto& [mode, counters] : modes) {
      families.Counter(prefix + "_missed_total", what + " gathered from the host store.",
                       counters->*unit.missed, {{"gpu", status.backend}, {"mode", mode}});
    }
  }
  families.Counter("clusterkv_host_gathered_bytes_total", "Bytes gathered from the host store.",
                   status.direct.gathered_bytes + status.served.gathered_bytes);
}

void AddPools(Families& families, const DaemonStatus& status) {
  const std::pair<const char*, uint64_t> states[] = {
      {"free", status.host.free_bytes()},
      {"reserved", status.host.reserved_bytes},
      {"used", status.host.used_bytes},
      {"quarantined", status.host.quarantined_bytes}};
  for (const auto& [state, bytes] : states) {
    families.Gauge("clusterkv_host_pool_bytes", "Pinned host memory by state.", bytes,
                   {{"state", state}});
  }
  families.Gauge("clusterkv_gpu_arena_bytes", "Device memory that sessions hold.",
                 status.gpu_used_bytes, {{"gpu", status.backend}});
}

}  // namespace

std::string MetricsText(const DaemonStatus& status) {
  Families families;
  AddCache(families, status);
  AddPools(families, status);
  families.Counter("clusterkv_ingested_tokens_total",
                   "Tokens whose K and V of all layers have arrived.", status.ingested_tokens);
  families.Counter("clusterkv_clustered_tokens_total", "Tokens of published segments.",
                   status.clustered_tokens);
  families.Counter("clusterkv_published_segments_total", "Segments published.",
                   status.published_segments);
  families.Counter("clusterkv_cluster_problems_total", "K-means of one (layer, KV head) done.",
                   status.cluster_problems);
  families.Add("clusterkv_cluster_seconds_total", MetricType::Counter, "Time spent in clustering.",
               status.cluster_seconds);
  families.Counter("clusterkv_sessions_started_total", "Sessions opened.", status.sessions_started);
  families.Counter("clusterkv_sessions_lost_total",
                   "Sessions that ended by a worker's death or a broken connection.",
                   status.sessions_ended_lost);
  families.Counter("clusterkv_rejected_attaches_total", "Attach attempts refused.",
                   status.rejected_attaches);
  families.Gauge("clusterkv_sessions", "Open sessions.", status.sessions.size());
  families.Gauge("clusterkv_sequences", "Registered sequences.", status.sequences);
  families.Gauge("clusterkv_grants", "Grants of the device plugin.", status.grants.size());
  uint64_t granted = 0;
  for (const GrantStatus& grant : status.grants) granted += grant.host.total_bytes;
  families.Gauge("clusterkv_grant_bytes", "Host memory that grants were promised, together.",
                 granted);
  families.Gauge("clusterkv_device_plugin_registered",
                 "1 if the kubelet knows and watches the device plugin.",
                 status.device_plugin_registered ? 1 : 0);
  families.Seconds("clusterkv_device_age_seconds", "Since the device last answered a probe.",
                   status.device_age_seconds);
  families.Gauge("clusterkv_ready", "1 if the daemon takes new work.", status.ready ? 1 : 0);
  families.Add("clusterkv_uptime_seconds", MetricType::Gauge, "Time since start.",
               status.uptime_seconds);
  families.Gauge("clusterkv_build_info", "Always 1; the labels tell the build.", 1,
                 {{"version", status.version}, {"backend", status.backend}});
  const ProcessUse process = ReadProcessUse();
  families.Add("process_cpu_seconds_total", MetricType::Counter, "User and system CPU time.",
               process.cpu_seconds);
  families.Gauge("process_resident_memory_bytes", "Resident memory, the host pool among it.",
                 process.resident_bytes);
  families.Gauge("process_open_fds", "Open file descriptors.", process.open_fds);
  return prometheus::TextSerializer().Serialize(families.all());
}

}  // namespace clusterkv::service
