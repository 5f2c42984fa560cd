// A session with one daemon, as the client, its sequences and its batches share it: connection,
// stream, attached memory, ingest ring. client/README.md draws how data flows and gives the order
// of locks.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/arena.h"
#include "client/attach_client.h"
#include "client/audit_helper.h"
#include "client/audit_ring.h"
#include "client/client.h"
#include "client/connection.h"
#include "client/fetch_calls.h"
#include "client/ingest_helper.h"
#include "client/ring_allocator.h"
#include "client/sequence_link.h"
#include "client/session_stream.h"
#include "gpu/device.h"

namespace clusterkv::client {

// Thread-safe. Shared, so that a sequence that outlives its client finds a closed session rather
// than freed memory.
class ClientSession final : private SessionListener {
 public:
  static absl::StatusOr<std::shared_ptr<ClientSession>> Open(const ClientOptions& options);
  ~ClientSession() override;

  // Gives everything back and ends the session. Bounded. Idempotent.
  void Close();
  // Not OK once the session has ended: why.
  absl::Status health() const;

  // Constant after Open.
  const ClientOptions& options() const { return options_; }
  const v1::Welcome& welcome() const { return stream_->welcome(); }
  const v1::SessionRef& reference() const { return reference_; }
  Connection& connection() { return *connection_; }
  gpu::Device& device() { return *device_; }
  AttachClient& attach() { return *attach_; }
  RingAllocator& ring() { return ring_; }
  IngestHelper& helper() { return helper_; }
  AuditHelper* audit() { return audit_.get(); }  // null: nothing is audited
  uint32_t ring_arena() const { return ring_arena_.id; }
  std::byte* ring_data() const { return ring_arena_.memory->data(); }

  Deadline RpcDeadline() const { return Deadline(options_.rpc_timeout); }
  bool draining() const { return draining_; }
  uint64_t NextKey() { return ++last_key_; }

  absl::StatusOr<Arena> AllocateArena(uint64_t bytes);
  // Arenas for inputs and outputs of served steps: the daemon keeps an arena until the session
  // ends, so one that a batch no longer needs serves the next. Errors: as AllocateArena.
  absl::StatusOr<Arena> TakeIoArena(uint64_t bytes);
  void ReturnIoArena(Arena arena);
  // One ring for all batches; for one whose slots are larger than that a new one takes its place.
  // Errors: as AllocateArena.
  absl::StatusOr<std::shared_ptr<AuditRing>> AuditRingFor(uint64_t slot_bytes);

  // By a connection of their own, or by gRPC where the daemon or the options have none.
  FetchCalls OpenFetchCalls();

  // One IngestTokens, again with the same key if it is not known whether the daemon took it.
  absl::Status SendRange(const v1::IngestTokensRequest& request, const Deadline& deadline);

  // Events about a sequence reach its link from AddSequence to RemoveSequence.
  void AddSequence(const std::shared_ptr<SequenceLink>& sequence, bool direct);
  void RemoveSequence(uint64_t id, bool direct);
  uint32_t direct_sequences() const { return direct_sequences_; }

  // The stream for work outside steps (copies of prompts, counters). Its user holds the lock from
  // the first enqueue to Synchronize, so that errors reach whose they are.
  struct StreamLease {
    std::unique_lock<std::mutex> lock;
    gpu::Stream& stream;
  };
  StreamLease LeaseStream() { return {std::unique_lock(stream_mutex_), *copy_stream_}; }

 private:
  explicit ClientSession(const ClientOptions& options);
  absl::Status OpenParts();
  void OnEvent(const v1::SessionEvent& event) override;
  void OnStreamEnded(const absl::Status& why) override;
  void OnAttachLost(const absl::Status& why);
  void End(const absl::Status& why);
  std::shared_ptr<SequenceLink> FindSequence(uint64_t id) const;

  const ClientOptions options_;
  v1::SessionRef reference_;
  std::string attach_path_;
  RingAllocator ring_;
  std::unique_ptr<Connection> connection_;
  std::unique_ptr<gpu::Device> device_;
  std::unique_ptr<gpu::Stream> copy_stream_;
  std::mutex stream_mutex_;  // of the users of copy_stream_
  Arena ring_arena_;
  std::atomic<uint64_t> last_key_{0};
  std::atomic<uint32_t> direct_sequences_{0};
  std::atomic<bool> draining_{false};

  mutable std::mutex mutex_;
  // Guarded by mutex_ until Open is done, then constant.
  std::unique_ptr<SessionStream> stream_;
  std::unique_ptr<AttachClient> attach_;
  // Guarded by mutex_.
  absl::Status ended_;
  bool closed_ = false;
  std::map<uint64_t, std::shared_ptr<SequenceLink>> sequences_;
  std::vector<Arena> idle_io_;
  std::shared_ptr<AuditRing> audit_ring_;  // null until a batch needs it

  IngestHelper helper_;
  std::unique_ptr<AuditHelper> audit_;
};

}  // namespace clusterkv::client
