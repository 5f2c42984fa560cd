// Sessions, sequences, their memory, and their calls.
#include <array>
#include <utility>

#include "service/metric_sections.h"

namespace clusterkv::service {
namespace {

// As grpc::StatusCode counts, in the words that gRPC servers export.
constexpr std::array<const char*, kGrpcCodes> kCodeNames = {
    "OK",       "Canceled",       "Unknown",          "InvalidArgument",   "DeadlineExceeded",
    "NotFound", "AlreadyExists",  "PermissionDenied", "ResourceExhausted", "FailedPrecondition",
    "Aborted",  "OutOfRange",     "Unimplemented",    "Internal",          "Unavailable",
    "DataLoss", "Unauthenticated"};

MetricLabels LabelsOf(const RpcStatus& rpc) {
  return {{"grpc_service", rpc.service}, {"grpc_method", rpc.method}, {"grpc_type", rpc.type}};
}

}  // namespace

void AddMemoryMetrics(MetricFamilies& families, const DaemonStatus& status) {
  const HostPoolStatus& host = status.host;
  const std::pair<const char*, uint64_t> states[] = {{"free", host.free_bytes()},
                                                     {"reserved", host.reserved_bytes},
                                                     {"used", host.used_bytes},
                                                     {"quarantined", host.quarantined_bytes}};
  for (const auto& [state, bytes] : states) {
    families.Gauge("clusterkv_host_pool_bytes",
                   "Host memory by state: free; promised to sequences; in chunks that are lent; in "
                   "chunks that an ended session may still have mapped.",
                   bytes, {{"state", state}});
  }
  families.Gauge(
      "clusterkv_host_pool_pinned_bytes",
      "Of the pool, what is pinned for the GPU: all of it with backend cuda, 0 with host.",
      host.pinned_bytes);
  families.Gauge("clusterkv_host_pool_chunk_bytes", "Size of a chunk, which is lent whole.",
                 host.chunk_bytes);
  families.Gauge("clusterkv_host_pool_extent_bytes",
                 "Of the lent chunks, what holds tokens. Measured once a second.",
                 status.host_extent_bytes);
  families.Gauge("clusterkv_host_pool_largest_free_extent_bytes",
                 "Largest piece that could be placed: a chunk while one is free, then the largest "
                 "hole in a session's chunks. Measured once a second.",
                 status.largest_free_extent_bytes);
  uint64_t granted = 0;
  for (const GrantStatus& grant : status.grants) granted += grant.host.total_bytes;
  families.Gauge("clusterkv_grants", "Grants of the device plugin.",
                 static_cast<uint64_t>(status.grants.size()));
  families.Gauge("clusterkv_grant_bytes", "Host memory that grants were promised, together.",
                 granted);
  families.Gauge("clusterkv_gpu_arena_bytes", "Device memory that sessions hold.",
                 status.gpu_used_bytes, {{"gpu", status.gpu}});
  families.Gauge("clusterkv_gpu_arena_limit_bytes", "Most that they may hold; 0: no bound.",
                 status.gpu_limit_bytes, {{"gpu", status.gpu}});
}

void AddSessionMetrics(MetricFamilies& families, const DaemonStatus& status) {
  families.Gauge("clusterkv_sessions", "Open sessions.",
                 static_cast<uint64_t>(status.sessions.size()));
  families.Counter("clusterkv_sessions_started_total", "Sessions opened.", status.sessions_started);
  for (size_t i = 0; i < status.sessions_ended.size(); ++i) {
    families.Counter("clusterkv_sessions_ended_total",
                     "Sessions that ended, by the first reason that was seen.",
                     status.sessions_ended[i], {{"reason", kSessionEndNames[i]}});
  }
  families.Counter("clusterkv_sessions_lost_total",
                   "Sessions that ended otherwise than by the worker's goodbye.",
                   status.sessions_ended_lost);
  families.Counter("clusterkv_rejected_attaches_total", "Attach attempts refused.",
                   status.rejected_attaches);
  families.Gauge("clusterkv_sequences", "Registered sequences.", status.sequences);
  const std::pair<const char*, const SequenceCounters*> modes[] = {
      {"direct", &status.direct_sequences}, {"served", &status.served_sequences}};
  for (const auto& [mode, counters] : modes) {
    families.Counter("clusterkv_sequences_registered_total", "Sequences registered.",
                     counters->registered, {{"mode", mode}});
  }
  for (const auto& [mode, counters] : modes) {
    families.Counter("clusterkv_sequences_released_total",
                     "Sequences released, by their worker or with their session.",
                     counters->released, {{"mode", mode}});
  }
  for (const auto& [mode, counters] : modes) {
    families.Counter("clusterkv_sequences_failed_total",
                     "Sequences that a failure of the daemon's has made useless.", counters->failed,
                     {{"mode", mode}});
  }
  for (size_t i = 0; i < status.refused.size(); ++i) {
    families.Counter("clusterkv_refused_total",
                     "Requests refused with RESOURCE_EXHAUSTED, by what there was too little of.",
                     status.refused[i], {{"limit", kLimitNames[i]}});
  }
  families.Gauge("clusterkv_waiting_calls", "WaitPublished calls that wait.", status.waiting_calls);
}

void AddRpcMetrics(MetricFamilies& families, const DaemonStatus& status) {
  for (const RpcStatus& rpc : status.rpcs) {
    families.Counter("grpc_server_started_total", "Calls that have reached a handler.", rpc.started,
                     LabelsOf(rpc));
  }
  for (const RpcStatus& rpc : status.rpcs) {
    for (size_t code = 0; code < kGrpcCodes; ++code) {
      MetricLabels labels = LabelsOf(rpc);
      labels["grpc_code"] = kCodeNames[code];
      families.Counter("grpc_server_handled_total", "Calls that were answered, by status code.",
                       rpc.handled[code], labels);
    }
  }
  for (const RpcStatus& rpc : status.rpcs) {
    families.Distribution("grpc_server_handling_seconds",
                          "From reaching the handler to the answer; of Session, its whole life.",
                          rpc.seconds, LabelsOf(rpc));
  }
}

}  // namespace clusterkv::service
