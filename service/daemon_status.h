// What the daemon tells of itself: one snapshot feeds GetStatus, /status and /metrics.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "service/grant_id.h"
#include "service/histogram.h"

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
  uint64_t pinned_bytes = 0;       // registered with the device
  uint64_t chunk_bytes = 0;
  uint64_t free_bytes() const {
    return total_bytes - used_bytes - reserved_bytes - quarantined_bytes;
  }
};

struct GrantStatus {
  GrantId grant = kNoGrant;
  HostPoolStatus host;  // the total is its limit
};

// Layers from this one on count together, so that a label has a bounded number of values.
constexpr size_t kCountedLayers = 128;

struct LayerHits {
  uint64_t hit_clusters = 0, missed_clusters = 0;
};

// Cumulative since start, of one fetch mode; never fall. Selected = hit + missed by construction,
// and the layers' add up to the whole.
struct CacheCounters {
  uint64_t hit_clusters = 0, missed_clusters = 0;
  uint64_t hit_tokens = 0, missed_tokens = 0;
  uint64_t hit_bytes = 0, missed_bytes = 0;
  uint64_t gathered_bytes = 0;
  uint64_t evicted_tokens = 0, evicted_bytes = 0;
  std::vector<LayerHits> layers;  // as many as a sequence has had, at most kCountedLayers
};

// The cluster caches of the live sequences of one fetch mode, as last sampled.
struct CacheFill {
  uint64_t used_bytes = 0, capacity_bytes = 0;
};

// Of one fetch mode. Live = registered - released.
struct SequenceCounters {
  uint64_t registered = 0, released = 0, failed = 0;
  uint64_t decode_steps = 0;  // begun, as last sampled: a token of a sequence each
};

// Why sessions end.
enum class SessionEnd {
  kClosed,          // the worker said goodbye
  kConnectionLost,  // its stream or its attach connection ended
  kWorkerDied,
  kAttachTimeout,
  kProtocolError,  // a message out of order, a false word about its mappings, events not read
  kDaemonStopped,
  kGrantRevoked,
};
constexpr std::array<const char*, 7> kSessionEndNames = {
    "closed",         "connection_lost", "worker_died",  "attach_timeout",
    "protocol_error", "daemon_stopped",  "grant_revoked"};

// What a request was refused for, with RESOURCE_EXHAUSTED.
enum class Limit {
  kSessions,
  kSequences,
  kArenas,
  kHostMemory,
  kGpuMemory,
  kRingCredits,
  kWaiters
};
constexpr std::array<const char*, 7> kLimitNames = {
    "sessions", "sequences", "arenas", "host_memory", "gpu_memory", "ring_credits", "waiters"};

// Rings are the arenas that a range was handed over in.
struct IngestStatus {
  uint64_t bytes = 0;  // of K and V that have arrived
  Histogram range;     // from IngestTokens to its credit
  uint64_t ring_bytes = 0, ring_used_bytes = 0;
  uint64_t ranges_in_flight = 0;  // handed over, credit not returned
};

struct ClusteringStatus {
  uint64_t problems = 0;    // k-means of one (layer, KV head) done
  uint64_t tokens = 0;      // keys in them
  uint64_t clusters = 0;    // found
  uint64_t iterations = 0;  // done
  uint64_t batches = 0;
  double seconds = 0;                           // of device work
  uint64_t waiting_jobs = 0, running_jobs = 0;  // a job is one layer of a segment
  double oldest_job_seconds = 0;                // 0: there is none
  uint64_t pending_segments = 0;                // complete, not published yet
  Histogram publish;                            // from a segment's first full layer to publishing
};

enum class FetchPhase { kQueue, kPrepare, kGather, kAttend, kFinish };
constexpr std::array<const char*, 5> kFetchPhaseNames = {"queue", "prepare", "gather", "attend",
                                                         "finish"};

struct FetchStatus {
  uint64_t sequences = 0;  // in the calls
  Histogram call;          // from admission to the reply
  std::array<Mean, kFetchPhaseNames.size()> phases;
};

// Decode steps compared with exact attention; see service/recall_audit.h.
struct AuditStatus {
  uint64_t steps = 0, skipped = 0;
  double seconds = 0;
  uint64_t recall_heads = 0, mass_heads = 0;  // query heads in the sums
  double recall_sum = 0, missed_mass_sum = 0;
};

// Copies whose time was taken.
struct TransferStatus {
  uint64_t bytes = 0;
  double seconds = 0;
};

struct ThreadStatus {
  const char* name = "";
  uint64_t waiting = 0, tasks = 0;
  double busy_seconds = 0, task_age_seconds = 0;
};

// One method of the gRPC service.
constexpr size_t kGrpcCodes = 17;
struct RpcStatus {
  std::string service, method, type;
  uint64_t started = 0;
  std::array<uint64_t, kGrpcCodes> handled{};  // by canonical code
  Histogram seconds;
};

struct DaemonStatus {
  std::string version;
  std::string backend;
  std::string device;  // description for people
  std::string gpu;     // name of the device in labels: its UUID, or the backend's where it has none
  uint64_t boot_epoch = 0;
  bool ready = false;
  bool draining = false;
  std::string not_ready_reason;
  double uptime_seconds = 0;
  double device_age_seconds = 0;  // since the device last answered a probe
  double tick_age_seconds = 0;    // since the core last did its housekeeping
  uint64_t sequences = 0;
  HostPoolStatus host;
  uint64_t host_extent_bytes = 0;          // of the lent chunks, that hold tokens
  uint64_t largest_free_extent_bytes = 0;  // in the host pool
  uint64_t gpu_used_bytes = 0;
  uint64_t gpu_limit_bytes = 0;  // 0: none
  std::vector<SessionStatus> sessions;
  std::vector<GrantStatus> grants;        // by id
  bool device_plugin_registered = false;  // filled in by who has the plugin
  uint64_t waiting_calls = 0;             // WaitPublished
  std::vector<ThreadStatus> threads;
  std::vector<RpcStatus> rpcs;  // filled in by who has the gRPC servers
  // Counters, and what goes with them.
  CacheCounters direct, served;
  CacheFill direct_fill, served_fill;
  SequenceCounters direct_sequences, served_sequences;
  IngestStatus ingest;
  ClusteringStatus clustering;
  FetchStatus fetch;
  AuditStatus audit;
  TransferStatus d2h, h2d;
  uint64_t ingested_tokens = 0;   // tokens over all layers, counted when the last layer has it
  uint64_t clustered_tokens = 0;  // tokens of published segments
  uint64_t published_segments = 0;
  uint64_t sessions_started = 0;
  std::array<uint64_t, kSessionEndNames.size()> sessions_ended{};
  uint64_t sessions_ended_lost = 0;  // by a worker's death or a broken stream
  uint64_t rejected_attaches = 0;
  std::array<uint64_t, kLimitNames.size()> refused{};
  uint64_t ignored_samples = 0;  // counters of a worker that fell or leapt
};

// What the workers of a grant may see: its sessions, and its part of the pool as if that were all.
// Of kNoGrant: everything.
DaemonStatus StatusOfGrant(DaemonStatus status, GrantId grant);

}  // namespace clusterkv::service
