#include "service/status_json.h"

#include <nlohmann/json.hpp>

namespace clusterkv::service {

std::string StatusJson(const DaemonStatus& status) {
  using Json = nlohmann::ordered_json;
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
                    {"attached", session.attached}});
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
                  {"host_bytes",
                   {{"total", status.host.total_bytes},
                    {"used", status.host.used_bytes},
                    {"reserved", status.host.reserved_bytes},
                    {"quarantined", status.host.quarantined_bytes}}},
                  {"gpu_bytes", {{"used", status.gpu_used_bytes}}},
                  {"session_list", list}};
  // A client's name may hold any bytes.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace clusterkv::service
