#include "client/ctl/status_json.h"

namespace clusterkv::client::ctl {
namespace {

using Json = nlohmann::ordered_json;

Json CacheJson(const v1::CacheCounters& counters) {
  return {
      {"hit_clusters", counters.hit_clusters()},    {"missed_clusters", counters.missed_clusters()},
      {"hit_tokens", counters.hit_tokens()},        {"missed_tokens", counters.missed_tokens()},
      {"hit_bytes", counters.hit_bytes()},          {"missed_bytes", counters.missed_bytes()},
      {"gathered_bytes", counters.gathered_bytes()}};
}

}  // namespace

Json SessionInfoJson(const v1::SessionInfo& session) {
  return {{"session_id", session.session_id()},
          {"client_name", session.client_name()},
          {"pid", session.pid()},
          {"uid", session.uid()},
          {"sequences", session.sequences()},
          {"host_bytes", session.host_bytes()},
          {"gpu_bytes", session.gpu_bytes()},
          {"age_seconds", session.age_seconds()},
          {"attached", session.attached()},
          {"grant", session.grant()}};
}

Json HostBytesJson(const v1::HostBytes& host) {
  return {{"total", host.total()},
          {"used", host.used()},
          {"reserved", host.reserved()},
          {"quarantined", host.quarantined()}};
}

Json GrantListJson(const v1::GetStatusReply& status) {
  Json grants = Json::array();
  for (const v1::GrantInfo& grant : status.grant_list()) {
    grants.push_back({{"grant", grant.grant()}, {"host_bytes", HostBytesJson(grant.host_bytes())}});
  }
  return grants;
}

Json CountersJson(const v1::GetStatusReply& status) {
  const v1::Counters& counters = status.counters();
  return {{"direct", CacheJson(counters.direct())},
          {"served", CacheJson(counters.served())},
          {"ingested_tokens", counters.ingested_tokens()},
          {"clustered_tokens", counters.clustered_tokens()},
          {"published_segments", counters.published_segments()},
          {"cluster_problems", counters.cluster_problems()},
          {"cluster_seconds", counters.cluster_seconds()},
          {"sessions_started", counters.sessions_started()},
          {"sessions_lost", counters.sessions_lost()},
          {"rejected_attaches", counters.rejected_attaches()}};
}

Json RecentErrorsJson(const v1::GetStatusReply& status) {
  Json errors = Json::array();
  for (const v1::RecentError& error : status.recent_errors()) {
    errors.push_back({{"time", error.time()},
                      {"level", error.level()},
                      {"text", error.text()},
                      {"count", error.count()}});
  }
  return errors;
}

}  // namespace clusterkv::client::ctl
