#include "service/daemon_status.h"

#include <algorithm>
#include <utility>

namespace clusterkv::service {

DaemonStatus StatusOfGrant(DaemonStatus status, GrantId grant) {
  if (grant == kNoGrant) return status;
  std::erase_if(status.sessions, [&](const SessionStatus& one) { return one.grant != grant; });
  std::erase_if(status.grants, [&](const GrantStatus& one) { return one.grant != grant; });
  status.host = status.grants.empty() ? HostPoolStatus{} : status.grants.front().host;
  status.sequences = 0;
  status.gpu_used_bytes = 0;
  for (const SessionStatus& session : status.sessions) {
    status.sequences += session.sequences;
    status.gpu_used_bytes += session.gpu_bytes;
  }
  return status;
}

}  // namespace clusterkv::service
