// What the core knows of sessions and sequences. All of it belongs to the core's thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/segment_plan.h"
#include "gpu/state_layout.h"
#include "service/cluster_scheduler.h"
#include "service/core_types.h"
#include "service/piece_table.h"
#include "service/ring_ranges.h"
#include "service/session_memory.h"
#include "service/slow_log.h"

namespace clusterkv::service {

struct Session;

constexpr size_t kMaxSessionChunks = 65'536;

// A segment whose layers are being clustered, until it is published.
struct PendingSegment {
  gpu::Segment segment;
  absl::Time complete;  // when the first of its layers was
  uint32_t layers_done = 0;
  std::vector<ClusterResult> layers;  // [layers]
};

struct Waiter {
  uint64_t id = 0;
  uint32_t length = 0;
  Completion<PublishedInfo> done;
};

// Where one layer of a sequence stands.
struct LayerProgress {
  explicit LayerProgress(const gpu::MethodOptions& method) : plan(method) {}
  uint32_t accepted = 0;  // tokens whose ranges were admitted
  uint32_t arrived = 0;   // tokens that lie in the host store (or are sinks)
  bool prompt_ended = false;
  gpu::SegmentPlan plan;      // segments handed to the scheduler
  uint32_t next_segment = 0;  // ordinal of the next one
};

struct ServedStep {
  bool started = false;
  uint32_t position = 0;
  uint32_t next_layer = 0;  // == layers: the step is complete
  bool in_flight = false;
};

struct Sequence {
  Sequence(Session& owner, SequenceId sequence_id, const RegisterRequest& registered,
           const gpu::MethodOptions& resolved, const gpu::StateLayout& state_layout);

  Session& session;
  const SequenceId id;
  const RegisterRequest request;
  const gpu::MethodOptions method;  // resolved
  const gpu::StateLayout layout;
  uint32_t generation = 0;
  double reserved_chunks = 0;
  uint64_t gpu_bytes = 0;  // taken from the device's budget

  std::unique_ptr<gpu::DeviceMemory> state;  // null until the device has made it
  std::unique_ptr<gpu::DeviceMemory> kept;   // what it will be made of, unless null
  ArenaId state_arena = 0;
  std::vector<Completion<RegisterReply>> registering;  // callers that wait for it

  PieceTable pieces;
  std::vector<LayerProgress> layers;
  std::optional<uint32_t> prompt_tokens;
  std::optional<IngestRequest> last_range;

  std::deque<PendingSegment> pending;        // first: ordinal published_segments
  std::vector<uint32_t> published_clusters;  // per (layer, head)
  uint32_t published_segments = 0;
  std::vector<uint32_t> segment_ends;  // of the published ones
  uint32_t cut = 0;
  bool publishing = false;
  std::vector<Waiter> waiters;

  ServedStep step;
  // As last sampled.
  std::vector<gpu::LayerCounters> counters;
  std::vector<uint64_t> evicted_tokens;  // per layer
  uint64_t steps = 0;
  uint64_t cached_bytes = 0;  // in its cluster cache
  bool sampling = false;      // a sample is on its way

  absl::Status failure;
  uint32_t in_flight = 0;  // pieces of device work that use its memory
  bool releasing = false;
  std::vector<Completion<bool>> released;  // callers of ReleaseSequence

  bool served() const { return request.mode == FetchMode::kServed; }
  uint32_t arrived() const;  // of the layer that is furthest behind
  bool prompt_ended() const;
  gpu::BatchSlot slot() const;
  uint64_t cache_bytes() const;  // capacity of its cluster cache, all layers and heads
};

struct Arena {
  std::unique_ptr<gpu::DeviceMemory> memory;
  uint64_t bytes = 0;
  bool ring = false;  // a range was handed over in it
};

struct KeptMemory {
  std::unique_ptr<gpu::DeviceMemory> memory;  // null: none
  uint64_t bytes = 0;                         // taken from the device's budget
};

struct Session : ChunkEvents {
  // Another registration may have brought one already: then it is the one that stays.
  void TakeChunkTable(std::unique_ptr<gpu::DeviceMemory> table);
  // Called by SessionMemory.
  void OnChunkLent(uint32_t chunk, PoolChunk pool_chunk) override;
  void OnChunkRevoked(uint32_t chunk) override;
  void OnChunkReturned(PoolChunk pool_chunk) override;

  SessionId id = 0;
  std::string token;
  HelloInfo hello;
  std::shared_ptr<SessionSink> sink;   // null once the session is over
  std::shared_ptr<AttachSink> attach;  // null before attaching and once it is over
  bool was_attached = false;
  PeerCredentials peer;
  absl::Time opened;

  HostPool* pool = nullptr;
  std::shared_ptr<HostAccount> account;  // what its memory is taken from
  std::unique_ptr<SessionMemory> memory;
  std::vector<PoolChunk> returned;  // to be zeroed and recycled by the core
  // Mapped address by chunk index.
  std::unique_ptr<const std::byte*[]> chunk_addresses;
  // Entries beyond this have never been set. Work threads read it: one that is behind looks up a
  // chunk where it is needed.
  std::atomic<uint32_t> chunk_count{0};
  // The same for the device: made with the first served sequence.
  std::unique_ptr<gpu::DeviceMemory> chunk_table;

  std::map<ArenaId, Arena> arenas;
  // Shared memory that is not used any more, but that the worker may have mapped, where nobody
  // counts that (Device::counts_importers). The session's next allocations take it; the device gets
  // it back when the worker maps nothing.
  std::vector<KeptMemory> kept;
  ArenaId next_arena = 1;
  uint32_t in_flight = 0;  // pieces of work that need the session, beside its sequences'
  uint64_t gpu_bytes = 0;
  RingRanges ranges;
  uint64_t ring_bytes = 0;  // of the arenas that are rings

  std::map<SequenceId, std::unique_ptr<Sequence>> sequences;
  std::unordered_map<uint64_t, SequenceId> idempotency;
  size_t waiters = 0;

  bool over = false;         // ended: only waits for its sequences to drain
  bool idle = false;         // and they have
  bool worker_gone = false;  // said goodbye, or is dead: it maps nothing
  OperationTrace ending;     // from its end to its last byte
};

}  // namespace clusterkv::service
