#include "service/daemon_status.h"

#include <algorithm>
#include <utility>

namespace clusterkv::service {

DaemonStatus StatusOfGrant(DaemonStatus status, GrantId grant) {
  if (grant == kNoGrant) return status;
  std::erase_if(status.sessions, [&](const SessionStatus& one) { return one.grant != grant; });
  std::erase_if(status.grants, [&](const GrantStatus& one) { return one.grant != grant; });
  status.host = status.grants.empty() ? HostPoolStatus{} : status.grants.front().host;
  // Counted for all together: they would tell of the others' work.
  status.direct = status.served = {};
  status.ingested_tokens = status.clustered_tokens = status.published_segments = 0;
  status.clustering = {};
  status.sessions_started = status.sessions_ended_lost = status.rejected_attaches = 0;
  status.sequences = 0;
  status.gpu_used_bytes = 0;
  for (const SessionStatus& session : status.sessions) {
    status.sequences += session.sequences;
    status.gpu_used_bytes += session.gpu_bytes;
  }
  return status;
}

}  // namespace clusterkv::service
