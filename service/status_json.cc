#include "service/status_json.h"

#include <nlohmann/json.hpp>

#include "gpu/dtype.h"

namespace clusterkv::service {
namespace {

using Json = nlohmann::ordered_json;

Json HostBytes(const HostPoolStatus& host) {
  return {{"total", host.total_bytes},
          {"used", host.used_bytes},
          {"reserved", host.reserved_bytes},
          {"quarantined", host.quarantined_bytes}};
}

std::string Dump(const Json& json) {
  // A client's name may hold any bytes.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

Json CacheJson(const CacheCounters& counters) {
  return {{"hit_clusters", counters.hit_clusters},    {"missed_clusters", counters.missed_clusters},
          {"hit_tokens", counters.hit_tokens},        {"missed_tokens", counters.missed_tokens},
          {"hit_bytes", counters.hit_bytes},          {"missed_bytes", counters.missed_bytes},
          {"gathered_bytes", counters.gathered_bytes}};
}

Json CountersJson(const DaemonStatus& status) {
  return {{"direct", CacheJson(status.direct)},
          {"served", CacheJson(status.served)},
          {"ingested_tokens", status.ingested_tokens},
          {"clustered_tokens", status.clustered_tokens},
          {"published_segments", status.published_segments},
          {"cluster_problems", status.clustering.problems},
          {"cluster_seconds", status.clustering.seconds},
          {"sessions_started", status.sessions_started},
          {"sessions_lost", status.sessions_ended_lost},
          {"rejected_attaches", status.rejected_attaches}};
}

}  // namespace

std::string StatusJson(const DaemonStatus& status, const std::vector<RecentError>& recent_errors) {
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
  Json errors = Json::array();
  for (const RecentError& error : recent_errors) {
    errors.push_back({{"time", error.time},
                      {"level", error.level},
                      {"text", error.text},
                      {"count", error.count}});
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
                  {"grant_list", grants},
                  {"device_age_seconds", status.device_age_seconds},
                  {"counters", CountersJson(status)},
                  {"recent_errors", errors}};
  return Dump(json);
}

std::string SequencesJson(uint64_t boot_epoch, const std::vector<SequenceStatus>& sequences) {
  Json list = Json::array();
  for (const SequenceStatus& sequence : sequences) {
    const gpu::Shape& shape = sequence.shape;
    list.push_back({{"sequence_id", sequence.sequence},
                    {"session_id", sequence.session},
                    {"mode", sequence.mode == FetchMode::kServed ? "served" : "direct"},
                    {"shape",
                     {{"layers", shape.layers},
                      {"kv_heads", shape.kv_heads},
                      {"q_heads", shape.q_heads},
                      {"head_dim", shape.head_dim},
                      {"dtype", gpu::DTypeName(shape.dtype)}}},
                    {"max_tokens", sequence.max_tokens},
                    {"ingested_tokens", sequence.ingested_tokens},
                    {"prompt_tokens", sequence.prompt_tokens},
                    {"published_segments", sequence.published_segments},
                    {"cut", sequence.cut},
                    {"host_bytes", sequence.host_bytes},
                    {"state_bytes", sequence.state_bytes},
                    {"failure", sequence.failure}});
  }
  return Dump({{"boot_epoch", boot_epoch}, {"sequences", list}});
}

}  // namespace clusterkv::service
