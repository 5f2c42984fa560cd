#include "client/ctl/top/rates.h"

#include <cstdint>

namespace clusterkv::client::ctl {
namespace {

// A daemon's counters never fall; one that did would be no rate.
double Grown(uint64_t before, uint64_t now) {
  return now > before ? static_cast<double>(now - before) : 0;
}

}  // namespace

CacheRates CacheRatesOf(const v1::CacheCounters& before, const v1::CacheCounters& now,
                        double seconds) {
  const double hit = Grown(before.hit_clusters(), now.hit_clusters());
  const double missed = Grown(before.missed_clusters(), now.missed_clusters());
  CacheRates rates{.clusters_per_second = (hit + missed) / seconds, .hit_rate = std::nullopt};
  if (hit + missed > 0) rates.hit_rate = hit / (hit + missed);
  return rates;
}

std::optional<Rates> RatesBetween(const v1::GetStatusReply& before, const v1::GetStatusReply& now) {
  const double seconds = now.uptime_seconds() - before.uptime_seconds();
  if (before.boot_epoch() != now.boot_epoch() || seconds <= 0) return std::nullopt;
  const v1::Counters& first = before.counters();
  const v1::Counters& last = now.counters();
  const double gathered = Grown(first.direct().gathered_bytes(), last.direct().gathered_bytes()) +
                          Grown(first.served().gathered_bytes(), last.served().gathered_bytes());
  return Rates{.seconds = seconds,
               .direct = CacheRatesOf(first.direct(), last.direct(), seconds),
               .served = CacheRatesOf(first.served(), last.served(), seconds),
               .gathered_bytes_per_second = gathered / seconds,
               .ingested_tokens_per_second =
                   Grown(first.ingested_tokens(), last.ingested_tokens()) / seconds,
               .clustered_tokens_per_second =
                   Grown(first.clustered_tokens(), last.clustered_tokens()) / seconds,
               .cluster_problems_per_second =
                   Grown(first.cluster_problems(), last.cluster_problems()) / seconds,
               .cluster_share = (last.cluster_seconds() - first.cluster_seconds()) / seconds};
}

}  // namespace clusterkv::client::ctl
