// The daemon's last minutes, a sample a second, so that a page opened now shows what just happened.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>

#include "service/daemon_status.h"

namespace clusterkv::service {

// Thread-safe.
class StatusHistory {
 public:
  static constexpr size_t kCapacity = 600;

  void Add(const DaemonStatus& status);
  // {"uptime_seconds":[...],"direct_hit_clusters":[...],...}: columns of one length, oldest first;
  // counters as they stood.
  std::string Json() const;

 private:
  struct Sample {
    double uptime_seconds = 0;
    CacheCounters direct, served;
    uint64_t ingested_tokens = 0, clustered_tokens = 0;
    double cluster_seconds = 0;
  };

  mutable std::mutex mu_;
  std::deque<Sample> samples_;  // guarded by mu_
};

}  // namespace clusterkv::service
