// What a daemon did between two of its statuses.
#pragma once

#include <optional>

#include "clusterkv/v1/status.pb.h"

namespace clusterkv::client::ctl {

struct CacheRates {
  double clusters_per_second = 0;  // selected
  std::optional<double> hit_rate;  // 0 to 1; nullopt where nothing was selected
};

struct Rates {
  double seconds = 0;  // between the two, by the daemon's clock
  CacheRates direct, served;
  double gathered_bytes_per_second = 0;
  double ingested_tokens_per_second = 0;
  double clustered_tokens_per_second = 0;
  double cluster_problems_per_second = 0;
  double cluster_share = 0;  // of the time, spent in clustering
};

// nullopt if there is no time between them, or another daemon has started.
std::optional<Rates> RatesBetween(const v1::GetStatusReply& before, const v1::GetStatusReply& now);

// Of all since the daemon's start.
CacheRates CacheRatesOf(const v1::CacheCounters& before, const v1::CacheCounters& now,
                        double seconds);

}  // namespace clusterkv::client::ctl
