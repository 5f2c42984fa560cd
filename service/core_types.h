// Requests and replies of the service core: plain values, no gRPC.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/method_options.h"
#include "gpu/shape.h"
#include "service/grant_id.h"

namespace clusterkv::service {

using SessionId = uint64_t;
using SequenceId = uint64_t;
using ArenaId = uint32_t;  // unique in its session; 0 is none

// Exactly one call of a completion, on the core's thread (or at once if the core refuses).
template <typename T>
using Completion = std::function<void(absl::StatusOr<T>)>;

// Who calls.
struct SessionKey {
  std::string token;
  uint64_t boot_epoch = 0;
  GrantId grant = kNoGrant;     // of the socket that the call came by; the worker has no say
  std::string request_id = {};  // of the call, for the log
};

struct SessionGroup {
  std::string id;
  uint32_t rank = 0, world_size = 0, kv_head_offset = 0;
};

struct HelloInfo {
  uint32_t protocol_version_min = 0, protocol_version_max = 0;
  std::vector<uint32_t> state_layout_versions;
  std::string client_name;
  std::optional<SessionGroup> group;
  GrantId grant = kNoGrant;     // of the socket that it came by
  std::string request_id = {};  // of the Session call, for the log
};

struct WelcomeInfo {
  uint32_t protocol_version = 0;
  uint32_t state_layout_version = 0;
  SessionId session = 0;
  std::string token;
};

struct ArenaInfo {
  ArenaId arena = 0;
  uint64_t bytes = 0;
};

enum class FetchMode { kDirect, kServed };

struct RegisterRequest {
  gpu::Shape shape;
  gpu::MethodOptions method;  // as sent, before Resolved
  uint32_t max_tokens = 0, reserve_tokens = 0;
  FetchMode mode = FetchMode::kDirect;
  uint64_t idempotency_key = 0;

  bool operator==(const RegisterRequest&) const = default;
};

struct RegisterReply {
  SequenceId sequence = 0;
  ArenaId state_arena = 0;
  uint64_t state_bytes = 0;
  uint32_t generation = 0;
};

struct IngestRequest {
  SequenceId sequence = 0;
  uint32_t position = 0, count = 0, layer_begin = 0, layer_count = 0;
  ArenaId arena = 0;
  uint64_t ring_offset = 0;
  bool end_of_prompt = false;
  uint64_t idempotency_key = 0;

  bool operator==(const IngestRequest&) const = default;
};

struct PublishedInfo {
  uint32_t segments = 0;
  uint32_t cut = 0;
};

// Inline bytes, or a place in an arena of the session.
struct TensorPlace {
  std::string inline_bytes;
  ArenaId arena = 0;  // 0: inline
  uint64_t offset = 0, bytes = 0;
};

struct FetchItem {
  SequenceId sequence = 0;
  uint32_t position = 0;
  TensorPlace q, k, v;
  std::optional<TensorPlace> output;  // always an arena
};

struct FetchRequest {
  uint32_t layer = 0;
  uint32_t budget_tokens = 0;
  std::vector<FetchItem> items;
  bool want_output = false, want_selection = false;
};

struct FetchResult {
  SequenceId sequence = 0;
  std::vector<float> output, lse;  // empty unless wanted inline
  std::vector<int32_t> selected;   // [kv_heads][budget], -1 beyond the last
  uint32_t cut = 0;
  uint32_t hit_clusters = 0, missed_clusters = 0;
  uint64_t hit_tokens = 0, missed_tokens = 0;  // of whole clusters
  uint64_t gathered_bytes = 0;
};

// A layer of a direct step, as a worker saw it.
struct AuditRequest {
  SequenceId sequence = 0;
  uint32_t layer = 0;
  TensorPlace slot;  // always an arena; gpu/audit_layout.h
};

struct SequenceStatus {
  SequenceId sequence = 0;
  SessionId session = 0;
  gpu::Shape shape;
  FetchMode mode = FetchMode::kDirect;
  uint32_t max_tokens = 0, ingested_tokens = 0, prompt_tokens = 0;
  uint32_t published_segments = 0, cut = 0;
  uint64_t host_bytes = 0, state_bytes = 0;
  std::string failure;
};

// What a session tells its worker on the Session stream. Called on the core's thread; must not
// block.
class SessionSink {
 public:
  virtual ~SessionSink() = default;
  virtual void CreditReturned(ArenaId arena, uint64_t offset, uint64_t bytes) = 0;
  virtual void SegmentPublished(SequenceId sequence, PublishedInfo info) = 0;
  virtual void SequenceFailed(SequenceId sequence, const absl::Status& why) = 0;
  virtual void Draining(uint64_t deadline_milliseconds) = 0;
  // The last call.
  virtual void Ended(const absl::Status& why) = 0;
};

// What a session tells its worker on the attach socket. Called on the core's thread; must not
// block. Descriptors are duplicated before the call returns.
class AttachSink {
 public:
  virtual ~AttachSink() = default;
  virtual void GrantArena(ArenaId arena, uint64_t bytes, int fd) = 0;
  virtual void RevokeArena(ArenaId arena) = 0;
  virtual void GrantChunk(uint32_t chunk, uint64_t bytes, int fd) = 0;
  virtual void RevokeChunk(uint32_t chunk) = 0;
  // The session is over: no more calls. The connection closes; the process is watched until it
  // dies (ServiceCore::WorkerDied) unless it said goodbye.
  virtual void SessionEnded() = 0;
};

struct PeerCredentials {
  uint32_t pid = 0, uid = 0, gid = 0;
};

}  // namespace clusterkv::service
