#include "service/metric_families.h"

namespace clusterkv::service {

using prometheus::ClientMetric;
using prometheus::MetricType;

ClientMetric& MetricFamilies::Add(const std::string& name, MetricType type, const std::string& help,
                                  const MetricLabels& labels) {
  if (families_.empty() || families_.back().name != name) {
    families_.push_back({.name = name, .help = help, .type = type, .metric = {}});
  }
  ClientMetric& metric = families_.back().metric.emplace_back();
  for (const auto& [label, text] : labels) metric.label.push_back({label, text});
  return metric;
}

void MetricFamilies::Counter(const std::string& name, const std::string& help, double value,
                             const MetricLabels& labels) {
  Add(name, MetricType::Counter, help, labels).counter.value = value;
}

void MetricFamilies::Gauge(const std::string& name, const std::string& help, double value,
                           const MetricLabels& labels) {
  Add(name, MetricType::Gauge, help, labels).gauge.value = value;
}

void MetricFamilies::Distribution(const std::string& name, const std::string& help,
                                  const Histogram& value, const MetricLabels& labels) {
  auto& histogram = Add(name, MetricType::Histogram, help, labels).histogram;
  for (size_t i = 0; i < value.counts().size(); ++i) {
    histogram.sample_count += value.counts()[i];
    if (i == Histogram::kBounds.size()) break;  // the serializer adds +Inf
    histogram.bucket.push_back(
        {.cumulative_count = histogram.sample_count, .upper_bound = Histogram::kBounds[i]});
  }
  histogram.sample_sum = value.sum();
}

void MetricFamilies::Summary(const std::string& name, const std::string& help, const Mean& value,
                             const MetricLabels& labels) {
  auto& summary = Add(name, MetricType::Summary, help, labels).summary;
  summary.sample_count = value.count;
  summary.sample_sum = value.sum;
}

}  // namespace clusterkv::service
