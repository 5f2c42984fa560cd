// Builds the families of one scrape, in the order in which they are added.
#pragma once

#include <prometheus/metric_family.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "service/histogram.h"

namespace clusterkv::service {

using MetricLabels = std::map<std::string, std::string>;

// Samples of one family follow one another: its name and help stand once.
class MetricFamilies {
 public:
  void Counter(const std::string& name, const std::string& help, double value,
               const MetricLabels& labels = {});
  void Counter(const std::string& name, const std::string& help, uint64_t value,
               const MetricLabels& labels = {}) {
    Counter(name, help, static_cast<double>(value), labels);
  }
  void Gauge(const std::string& name, const std::string& help, double value,
             const MetricLabels& labels = {});
  void Gauge(const std::string& name, const std::string& help, uint64_t value,
             const MetricLabels& labels = {}) {
    Gauge(name, help, static_cast<double>(value), labels);
  }
  void Distribution(const std::string& name, const std::string& help, const Histogram& value,
                    const MetricLabels& labels = {});
  // A summary without quantiles: count and sum.
  void Summary(const std::string& name, const std::string& help, const Mean& value,
               const MetricLabels& labels = {});

  const std::vector<prometheus::MetricFamily>& all() const { return families_; }

 private:
  prometheus::ClientMetric& Add(const std::string& name, prometheus::MetricType type,
                                const std::string& help, const MetricLabels& labels);

  std::vector<prometheus::MetricFamily> families_;
};

}  // namespace clusterkv::service
