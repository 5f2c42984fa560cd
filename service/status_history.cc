#include "service/status_history.h"

#include <nlohmann/json.hpp>

namespace clusterkv::service {

void StatusHistory::Add(const DaemonStatus& status) {
  const std::lock_guard lock(mu_);
  samples_.push_back({.uptime_seconds = status.uptime_seconds,
                      .direct = status.direct,
                      .served = status.served,
                      .ingested_tokens = status.ingested_tokens,
                      .clustered_tokens = status.clustered_tokens,
                      .cluster_seconds = status.clustering.seconds});
  if (samples_.size() > kCapacity) samples_.pop_front();
}

std::string StatusHistory::Json() const {
  using Json = nlohmann::ordered_json;
  const std::lock_guard lock(mu_);
  const auto column = [this](const auto& value) {
    Json values = Json::array();
    for (const Sample& sample : samples_) values.push_back(value(sample));
    return values;
  };
  const auto cache = [&](CacheCounters Sample::*mode, uint64_t CacheCounters::*field) {
    return column([=](const Sample& sample) { return (sample.*mode).*field; });
  };
  const Json json{
      {"uptime_seconds", column([](const Sample& sample) { return sample.uptime_seconds; })},
      {"direct_hit_clusters", cache(&Sample::direct, &CacheCounters::hit_clusters)},
      {"direct_missed_clusters", cache(&Sample::direct, &CacheCounters::missed_clusters)},
      {"served_hit_clusters", cache(&Sample::served, &CacheCounters::hit_clusters)},
      {"served_missed_clusters", cache(&Sample::served, &CacheCounters::missed_clusters)},
      {"gathered_bytes", column([](const Sample& sample) {
         return sample.direct.gathered_bytes + sample.served.gathered_bytes;
       })},
      {"ingested_tokens", column([](const Sample& sample) { return sample.ingested_tokens; })},
      {"clustered_tokens", column([](const Sample& sample) { return sample.clustered_tokens; })},
      {"cluster_seconds", column([](const Sample& sample) { return sample.cluster_seconds; })}};
  return json.dump() + "\n";
}

}  // namespace clusterkv::service
