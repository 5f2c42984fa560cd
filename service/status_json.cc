#include "service/status_json.h"

#include <nlohmann/json.hpp>

namespace clusterkv::service {

using Json = nlohmann::ordered_json;

namespace {

Json HostBytes(const HostPoolStatus& host) {
  return {{"total", host.total_bytes},
          {"used", host.used_bytes},
          {"reserved", host.reserved_bytes},
          {"quarantined", host.quarantined_bytes}};
}

}  // namespace

std::string StatusJson(const DaemonStatus& status) {
  Json list = Json::array();
  for (const SessionStatus& session : status.sessions) {
    list.push_back({{"session_id", session.session_id},
                    {"client_name", session.client_name},
                    {"pid", session.pid},
                    {"uid", session.uid},
                    {"sequences", session.sequences},
                    {"host_bytes", session.host_bytes},
                    {"gpu_bytes", session.gpu_bytes},
                    {"age_seconds", session.age_seconds},
                    {"attached", session.attached},
                    {"grant", session.grant == kNoGrant ? "" : GrantText(session.grant)}});
  }
  Json grants = Json::array();
  for (const GrantStatus& grant : status.grants) {
    grants.push_back({{"grant", GrantText(grant.grant)}, {"host_bytes", HostBytes(grant.host)}});
  }
  const Json json{{"version", status.version},
                  {"backend", status.backend},
                  {"device", status.device},
                  {"boot_epoch", status.boot_epoch},
                  {"ready", status.ready},
                  {"not_ready_reason", status.not_ready_reason},
                  {"uptime_seconds", status.uptime_seconds},
                  {"sessions", status.sessions.size()},
                  {"sequences", status.sequences},
                  {"host_bytes", HostBytes(status.host)},
                  {"gpu_bytes", {{"used", status.gpu_used_bytes}}},
                  {"session_list", list},
                  {"grant_list", grants}};
  // A client's name may hold any bytes.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace clusterkv::service
