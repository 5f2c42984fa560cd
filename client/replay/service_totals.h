// What runs against the service add up to, per layer, and how processes tell each other.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/replay/measures.h"
#include "nlohmann/json.hpp"

namespace clusterkv::client::replay {

// Sums over sequences and steps of one layer at one budget.
struct LayerTotals {
  Measures measures;
  uint64_t hit_clusters = 0;
  uint64_t missed_clusters = 0;
  uint64_t gathered_bytes = 0;
  uint64_t window_tokens = 0;
  uint64_t candidate_tokens = 0;
  uint64_t steps = 0;  // of all sequences

  LayerTotals& operator+=(const LayerTotals& other);
  // Found in the cache / selected; 1 where nothing was selected.
  double HitRate() const;
  double HostBytesPerStep() const;
};

struct ServiceTotals {
  std::string backend;                            // the daemon's
  std::vector<std::vector<LayerTotals>> budgets;  // [budget, rising][layer]

  // Adds another worker's; both have the same extents.
  void Merge(const ServiceTotals& other);
};

nlohmann::json ToJson(const ServiceTotals& totals);
// Errors: INTERNAL unless ToJson wrote it with these extents.
absl::StatusOr<ServiceTotals> ServiceTotalsFromJson(const nlohmann::json& json, size_t budgets,
                                                    size_t layers);

}  // namespace clusterkv::client::replay
