// What the daemon tells of itself: one snapshot feeds GetStatus, /status and /metrics.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "service/grant_id.h"

namespace clusterkv::service {

struct SessionStatus {
  uint64_t session_id = 0;
  std::string client_name;
  uint32_t pid = 0;  // 0 across pid namespaces
  uint32_t uid = 0;
  uint64_t sequences = 0;
  uint64_t host_bytes = 0;  // whole chunks lent
  uint64_t gpu_bytes = 0;
  double age_seconds = 0;
  bool attached = false;
  GrantId grant = kNoGrant;
};

struct HostPoolStatus {
  uint64_t total_bytes = 0;
  uint64_t used_bytes = 0;         // whole chunks lent to live sessions
  uint64_t reserved_bytes = 0;     // promised to sequences, not lent yet
  uint64_t quarantined_bytes = 0;  // of ended sessions that may still have it mapped
  uint64_t free_bytes() const {
    return total_bytes - used_bytes - reserved_bytes - quarantined_bytes;
  }
};

struct GrantStatus {
  GrantId grant = kNoGrant;
  HostPoolStatus host;  // the total is its limit
};

// Cumulative since start, of one fetch mode; never fall. Selected = hit + missed by construction.
struct CacheCounters {
  uint64_t hit_clusters = 0, missed_clusters = 0;
  uint64_t hit_tokens = 0, missed_tokens = 0;
  uint64_t hit_bytes = 0, missed_bytes = 0;
  uint64_t gathered_bytes = 0;
};

struct DaemonStatus {
  std::string version;
  std::string backend;
  std::string device;  // description for people
  uint64_t boot_epoch = 0;
  bool ready = false;
  std::string not_ready_reason;
  double uptime_seconds = 0;
  double device_age_seconds = 0;  // since the device last answered a probe
  uint64_t sequences = 0;
  HostPoolStatus host;
  uint64_t gpu_used_bytes = 0;
  std::vector<SessionStatus> sessions;
  std::vector<GrantStatus> grants;  // by id
  bool device_plugin_registered = false;
  // Counters.
  CacheCounters direct;
  CacheCounters served;
  uint64_t ingested_tokens = 0;   // tokens over all layers, counted when the last layer has it
  uint64_t clustered_tokens = 0;  // tokens of published segments
  uint64_t published_segments = 0;
  uint64_t cluster_problems = 0;  // k-means done
  double cluster_seconds = 0;     // of device work
  uint64_t sessions_started = 0;
  uint64_t sessions_ended_lost = 0;  // by a worker's death or a broken stream
  uint64_t rejected_attaches = 0;
};

// What the workers of a grant may see: its sessions, and its part of the pool as if that were all.
// Of kNoGrant: everything.
DaemonStatus StatusOfGrant(DaemonStatus status, GrantId grant);

}  // namespace clusterkv::service
