#include "client/replay/service_totals.h"

#include <utility>

#include "absl/status/status.h"

namespace clusterkv::client::replay {
namespace {

constexpr size_t kFields = 10;

nlohmann::json ToJson(const LayerTotals& totals) {
  const Measures& measures = totals.measures;
  return {measures.recall,       measures.output_error, measures.mass,
          measures.count,        totals.hit_clusters,   totals.missed_clusters,
          totals.gathered_bytes, totals.window_tokens,  totals.candidate_tokens,
          totals.steps};
}

bool FromJson(const nlohmann::json& json, LayerTotals& totals) {
  if (!json.is_array() || json.size() != kFields) return false;
  for (const auto& field : json) {
    if (!field.is_number()) return false;
  }
  Measures& measures = totals.measures;
  measures = {json[0].get<double>(), json[1].get<double>(), json[2].get<double>(),
              json[3].get<uint64_t>()};
  uint64_t* const counts[] = {&totals.hit_clusters,     &totals.missed_clusters,
                              &totals.gathered_bytes,   &totals.window_tokens,
                              &totals.candidate_tokens, &totals.steps};
  size_t field = 4;
  for (uint64_t* count : counts) *count = json[field++].get<uint64_t>();
  return true;
}

}  // namespace

LayerTotals& LayerTotals::operator+=(const LayerTotals& other) {
  measures += other.measures;
  hit_clusters += other.hit_clusters;
  missed_clusters += other.missed_clusters;
  gathered_bytes += other.gathered_bytes;
  window_tokens += other.window_tokens;
  candidate_tokens += other.candidate_tokens;
  steps += other.steps;
  return *this;
}

double LayerTotals::HitRate() const {
  const uint64_t selected = hit_clusters + missed_clusters;
  if (selected == 0) return 1.0;
  return static_cast<double>(hit_clusters) / static_cast<double>(selected);
}

double LayerTotals::HostBytesPerStep() const {
  return steps == 0 ? 0.0 : static_cast<double>(gathered_bytes) / static_cast<double>(steps);
}

void ServiceTotals::Merge(const ServiceTotals& other) {
  if (budgets.empty()) {
    *this = other;
    return;
  }
  for (size_t budget = 0; budget < budgets.size(); ++budget) {
    for (size_t layer = 0; layer < budgets[budget].size(); ++layer) {
      budgets[budget][layer] += other.budgets[budget][layer];
    }
  }
}

nlohmann::json ToJson(const ServiceTotals& totals) {
  nlohmann::json rows = nlohmann::json::array();
  for (const auto& layers : totals.budgets) {
    nlohmann::json row = nlohmann::json::array();
    for (const LayerTotals& layer : layers) row.push_back(ToJson(layer));
    rows.push_back(std::move(row));
  }
  return {{"backend", totals.backend}, {"budgets", std::move(rows)}};
}

absl::StatusOr<ServiceTotals> ServiceTotalsFromJson(const nlohmann::json& json, size_t budgets,
                                                    size_t layers) {
  const absl::Status malformed = absl::InternalError("a worker's result is malformed");
  if (!json.is_object() || !json.contains("backend") || !json.contains("budgets")) {
    return malformed;
  }
  ServiceTotals totals;
  if (!json["backend"].is_string() || json["budgets"].size() != budgets) return malformed;
  totals.backend = json["backend"].get<std::string>();
  for (const auto& row : json["budgets"]) {
    if (row.size() != layers) return malformed;
    totals.budgets.emplace_back(layers);
    for (size_t layer = 0; layer < layers; ++layer) {
      if (!FromJson(row[layer], totals.budgets.back()[layer])) return malformed;
    }
  }
  return totals;
}

}  // namespace clusterkv::client::replay
