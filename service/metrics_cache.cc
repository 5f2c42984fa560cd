// What the cluster caches found and missed, of each fetch mode.
#include <string>
#include <utility>

#include "service/metric_sections.h"

namespace clusterkv::service {
namespace {

struct Mode {
  const char* name;
  const CacheCounters* counters;
  const CacheFill* fill;
  const SequenceCounters* sequences;
};

struct Unit {
  const char* name;
  const char* what;
  uint64_t CacheCounters::*hit;
  uint64_t CacheCounters::*missed;
};

void AddUnit(MetricFamilies& families, const Unit& unit, const auto& each_mode) {
  const std::string prefix = std::string("clusterkv_cache_") + unit.name;
  const std::string what = unit.what;
  each_mode([&](const Mode& mode, const MetricLabels& labels) {
    families.Counter(prefix + "_selected_total", what + ": hit + missed.",
                     mode.counters->*unit.hit + mode.counters->*unit.missed, labels);
  });
  each_mode([&](const Mode& mode, const MetricLabels& labels) {
    families.Counter(prefix + "_hit_total", what + ", found in the cluster cache.",
                     mode.counters->*unit.hit, labels);
  });
  each_mode([&](const Mode& mode, const MetricLabels& labels) {
    families.Counter(prefix + "_missed_total", what + ", gathered from the host store.",
                     mode.counters->*unit.missed, labels);
  });
}

void AddLayers(MetricFamilies& families, const auto& each_mode) {
  const auto add = [&](const char* name, const char* help, uint64_t LayerHits::*counter) {
    each_mode([&](const Mode& mode, const MetricLabels& labels) {
      for (size_t layer = 0; layer < mode.counters->layers.size(); ++layer) {
        MetricLabels with_layer = labels;
        with_layer["layer"] = std::to_string(layer);
        families.Counter(name, help, mode.counters->layers[layer].*counter, with_layer);
      }
    });
  };
  add("clusterkv_cache_layer_clusters_hit_total",
      "Clusters of one layer found in the cluster cache. Layers from 127 on count as 127; those "
      "that "
      "no sequence has had are not there.",
      &LayerHits::hit_clusters);
  add("clusterkv_cache_layer_clusters_missed_total",
      "Clusters of one layer gathered from the host store. Layers as above.",
      &LayerHits::missed_clusters);
}

}  // namespace

void AddCacheMetrics(MetricFamilies& families, const DaemonStatus& status) {
  const Mode modes[] = {{"direct", &status.direct, &status.direct_fill, &status.direct_sequences},
                        {"served", &status.served, &status.served_fill, &status.served_sequences}};
  const auto each_mode = [&](const auto& add) {
    for (const Mode& mode : modes) {
      add(mode, MetricLabels{{"gpu", status.gpu}, {"mode", mode.name}});
    }
  };
  AddUnit(families,
          {"clusters", "Clusters that steps selected", &CacheCounters::hit_clusters,
           &CacheCounters::missed_clusters},
          each_mode);
  AddUnit(families,
          {"tokens", "Tokens of selected clusters", &CacheCounters::hit_tokens,
           &CacheCounters::missed_tokens},
          each_mode);
  AddUnit(families,
          {"bytes", "Bytes of selected clusters", &CacheCounters::hit_bytes,
           &CacheCounters::missed_bytes},
          each_mode);
  AddLayers(families, each_mode);
  each_mode([&](const Mode& mode, const MetricLabels& labels) {
    families.Counter("clusterkv_cache_tokens_evicted_total",
                     "Tokens that made room for others in the cluster cache.",
                     mode.counters->evicted_tokens, labels);
  });
  each_mode([&](const Mode& mode, const MetricLabels& labels) {
    families.Counter("clusterkv_cache_bytes_evicted_total",
                     "Bytes that made room for others in the cluster cache.",
                     mode.counters->evicted_bytes, labels);
  });
  each_mode([&](const Mode& mode, MetricLabels labels) {
    const uint64_t used = mode.fill->used_bytes;
    for (const auto& [state, bytes] :
         {std::pair("used", used), std::pair("free", mode.fill->capacity_bytes - used)}) {
      labels["state"] = state;
      families.Gauge("clusterkv_cache_bytes", "Cluster caches of live sequences.", bytes, labels);
    }
  });
  families.Counter("clusterkv_host_gathered_bytes_total", "Bytes gathered from the host store.",
                   status.direct.gathered_bytes + status.served.gathered_bytes);
  each_mode([&](const Mode& mode, const MetricLabels& labels) {
    families.Counter("clusterkv_decode_steps_total",
                     "Decode steps begun, each a token of one sequence.",
                     mode.sequences->decode_steps, labels);
  });
  families.Counter("clusterkv_ignored_samples_total",
                   "Counters of sequences that fell or leapt and were not taken: a worker wrote "
                   "where it must not.",
                   status.ignored_samples);
}

}  // namespace clusterkv::service
