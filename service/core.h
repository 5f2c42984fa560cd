// The service itself: sessions, sequences, memory, ingest, clustering, served fetch. No gRPC, no
// sockets; transport, device, and clock are handed in.
//
// All state belongs to one thread, the core's: a call posts itself there and completes through a
// callback on it. Whatever takes long runs elsewhere and posts back: staging (ingest), k-means
// (ClusterScheduler), served fetch, and allocation and zeroing (memory). So there are no locks over
// the state, and service/README.md lists the few that are left.
//
// Keys and ids are checked first in every call: UNAUTHENTICATED for an unknown token,
// FAILED_PRECONDITION for another boot's epoch or before attaching, NOT_FOUND for an id of another
// session. A token counts on the sockets of its session's grant only. A full queue is
// RESOURCE_EXHAUSTED at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gpu/device.h"
#include "service/cluster_scheduler.h"
#include "service/core_types.h"
#include "service/daemon_status.h"
#include "service/device_watch.h"
#include "service/host_account.h"
#include "service/host_pool.h"
#include "service/serve_tensors.h"
#include "service/session_state.h"
#include "service/slow_log.h"
#include "service/task_queue.h"

namespace clusterkv::service {

struct CoreOptions {
  std::string version;
  uint64_t boot_epoch = 0;
  uint64_t gpu_memory_bytes = 0;  // 0: no bound
  // Of the host pool, kept for grants. Whole chunks, at most the pool.
  uint64_t offered_bytes = 0;
  size_t max_sessions = 64;  // of each grant, and of those without one
  size_t max_sequences_per_session = 1024;
  size_t max_arenas_per_session = 64;
  absl::Duration attach_timeout = absl::Seconds(10);
  absl::Duration poll = absl::ZeroDuration();  // of the core's and the serve thread; see TaskQueue
  double audit_share = 0.05;                   // of a core, that audits may take; 0: none is made
  absl::Duration slow_operation = absl::ZeroDuration();  // 0: none is logged
  std::function<absl::Time()> now = [] { return absl::Now(); };
};

class ServiceCore {
 public:
  static absl::StatusOr<std::unique_ptr<ServiceCore>> Create(CoreOptions options,
                                                             std::unique_ptr<gpu::Device> device,
                                                             std::unique_ptr<HostPool> pool);
  ~ServiceCore();

  // --- Sessions -------------------------------------------------------------------------------
  void OpenSession(HelloInfo hello, std::shared_ptr<SessionSink> sink,
                   Completion<WelcomeInfo> done);
  // The stream has ended, or something makes the session impossible. Idempotent.
  void EndSession(SessionId session, absl::Status why,
                  SessionEnd reason = SessionEnd::kConnectionLost);
  void Attach(SessionKey key, PeerCredentials peer, std::shared_ptr<AttachSink> sink,
              Completion<SessionId> done);
  // A worker that lies about its mappings loses its session.
  void ChunkMapped(SessionId session, uint32_t chunk);
  void ChunkUnmapped(SessionId session, uint32_t chunk);
  void Goodbye(SessionId session);
  // The process is proven dead.
  void WorkerDied(SessionId session);
  void CountRejectedAttach() { ++rejected_attaches_; }

  // --- Grants ---------------------------------------------------------------------------------
  // Its sessions, those that come by its sockets, share `bytes` of host memory: whole chunks, may
  // be 0. What revoked grants of the same devices (`former`) have not given back yet is left out
  // until then. Errors: ALREADY_EXISTS, RESOURCE_EXHAUSTED (beyond what is offered), UNAVAILABLE
  // (draining).
  void OpenGrant(GrantId grant, uint64_t bytes, std::vector<GrantId> former, Completion<bool> done);
  // Ends its sessions with `why`; no new one opens. False if there is no such grant.
  // REQUIRES: not kNoGrant.
  void RevokeGrant(GrantId grant, absl::Status why, Completion<bool> done);

  // --- Sequences ------------------------------------------------------------------------------
  void AllocateArena(SessionKey key, uint64_t bytes, Completion<ArenaInfo> done);
  void RegisterSequence(SessionKey key, RegisterRequest request, Completion<RegisterReply> done);
  void IngestTokens(SessionKey key, IngestRequest request, Completion<uint32_t> done);
  // Returns an id for CancelWait.
  uint64_t WaitPublished(SessionKey key, SequenceId sequence, uint32_t length,
                         Completion<PublishedInfo> done);
  // The waiter completes with CANCELLED, if it is still there.
  void CancelWait(uint64_t waiter);
  void FetchClusters(SessionKey key, FetchRequest request,
                     Completion<std::vector<FetchResult>> done);
  // True: it was audited; false: skipped.
  void AuditDecodeStep(SessionKey key, AuditRequest request, Completion<bool> done);
  void ReleaseSequence(SessionKey key, SequenceId sequence, Completion<bool> done);
  // Without a key: of all sessions of the grant, or with kNoGrant of all there are.
  void ListSequences(std::optional<SessionKey> key, Completion<std::vector<SequenceStatus>> done,
                     GrantId grant = kNoGrant);

  // --- Life -----------------------------------------------------------------------------------
  // Housekeeping, once a second: attach timeouts, what sequences count, the device's health.
  // Without it the core counts as stuck.
  void Tick();
  // Refuses new work and tells every session. `idle` is called once all sessions are over and
  // nothing of theirs is in flight; workers may still have host memory mapped.
  void Drain(absl::Duration timeout, std::function<void()> idle);
  // The latest snapshot; cheap, waits for no other thread's work. Thread-safe.
  DaemonStatus status() const;
  uint64_t boot_epoch() const { return options_.boot_epoch; }
  uint64_t chunk_bytes() const { return pool_->chunk_bytes(); }
  const std::string& backend() const { return device_->backend(); }
  const std::string& device_uuid() const { return device_->uuid(); }
  // Every session is over, whatever it does.
  void EndAllSessions();
  // Ends all sessions and all threads. After the transports: their calls are answered before.
  // Idempotent.
  void Stop();

 private:
  ServiceCore(CoreOptions options, std::unique_ptr<gpu::Device> device,
              std::unique_ptr<HostPool> pool);
  absl::Status Start();

  // Runs `call` on the core's thread, or refuses through `done`.
  template <typename T>
  void Call(Completion<T> done, std::function<void(Completion<T>)> call);
  void ProbeDevice();

  // core.cc
  absl::StatusOr<Session*> FindSession(const SessionKey& key, bool attached = true);
  absl::StatusOr<Sequence*> FindSequence(Session& session, SequenceId id);
  Sequence* SequenceById(SessionId session, SequenceId id);
  void End(Session& session, SessionEnd reason, const absl::Status& why);
  void FinishEnd(Session& session);

  // core_memory.cc
  absl::Status TakeGpuBytes(Session& session, uint64_t bytes);
  void GiveGpuBytes(Session& session, uint64_t bytes);
  void DiscardMemory(std::unique_ptr<gpu::DeviceMemory> memory);
  void FreeDeviceMemory(std::unique_ptr<gpu::DeviceMemory> memory, Session& session,
                        uint64_t bytes);
  // For memory that the worker will map, at least `taken.bytes`: what the session has kept, else
  // within the budget.
  absl::Status TakeSharedBytes(Session& session, KeptMemory& taken);
  // On the memory thread. `memory`: what was kept, or null; then zeroed.
  absl::Status MakeShared(std::unique_ptr<gpu::DeviceMemory>& memory, uint64_t bytes);
  void FreeSharedMemory(std::unique_ptr<gpu::DeviceMemory> memory, Session& session,
                        uint64_t bytes);
  // REQUIRES: the worker maps nothing.
  void FreeKept(Session& session);
  void DoAllocateArena(Session& session, uint64_t bytes, Completion<ArenaInfo> done);
  void RecycleReturned(Session& session);
  void Recycle(PoolChunk chunk, std::shared_ptr<HostAccount> account);
  void RecycleUnclean();
  absl::StatusOr<const std::byte*> ArenaBytes(const Session& session, ArenaId arena,
                                              uint64_t offset, uint64_t bytes) const;

  // core_sequences.cc
  void DoRegister(Session& session, const RegisterRequest& request, Completion<RegisterReply> done);
  void MakeState(Sequence& sequence);
  // On the memory thread. `memory`: what was kept for it, or null.
  absl::Status MakeStateMemory(const Sequence& sequence,
                               std::unique_ptr<gpu::DeviceMemory>& memory);
  void FinishRegister(Sequence& sequence, absl::Status status);
  void Release(Sequence& sequence);
  void MaybeFinishRelease(Sequence& sequence);
  void Fail(Sequence& sequence, const absl::Status& why);
  void FailWaiters(Sequence& sequence, const absl::Status& why);
  SequenceStatus Describe(const Sequence& sequence) const;

  // core_status.cc
  struct Sample;
  void PublishStatus();
  void MeasureHostMemory();
  absl::StatusOr<Sample> TakeSample(const Sequence& sequence);
  void TakeSamples(std::vector<Sequence*> sequences);
  void FoldSample(Sequence& sequence, const Sample& sample);
  void FoldCounters(Sequence& sequence, size_t layer, const gpu::LayerCounters& now);
  void CountRegistered(const Sequence& sequence);
  void CountReleased(const Sequence& sequence);
  void CountRefused(Limit limit) { ++counters_.refused[static_cast<size_t>(limit)]; }
  SequenceCounters& CountersOf(const Sequence& sequence);
  CacheFill& FillOf(const Sequence& sequence);

  // core_ingest.cc
  void DoIngest(Session& session, const IngestRequest& request, const OperationTrace& trace,
                const Completion<uint32_t>& done);
  absl::Status CheckIngest(const Sequence& sequence, const IngestRequest& request) const;
  struct StageWork;
  absl::Status RunStage(StageWork& work);
  void FinishStage(SessionId session, StageWork& work, const absl::Status& status);
  void SubmitReady(Sequence& sequence);
  void SubmitLayer(Sequence& sequence, uint32_t layer, const gpu::Segment& segment);
  void FinishCluster(SessionId session, SequenceId sequence, uint32_t ordinal, uint32_t layer,
                     absl::StatusOr<ClusterResult> result);
  void CountClustered(const Sequence& sequence, uint32_t tokens, const ClusterResult& result);
  void MaybePublish(Sequence& sequence);
  void FinishPublish(SessionId session, SequenceId sequence, const absl::Status& status);
  void DoWait(Session& session, Sequence& sequence, Waiter waiter);
  void NotifyWaiters(Sequence& sequence);
  bool WaitIsOver(const Sequence& sequence, uint32_t length) const;

  // core_audit.cc
  struct AuditWork;
  absl::Status PrepareAudit(const Session& session, const Sequence& sequence,
                            const AuditRequest& request, AuditWork& work) const;
  void StartAudit(Sequence& sequence, const std::shared_ptr<AuditWork>& work,
                  const Completion<bool>& done);

  // core_serve.cc
  struct ServeWork;
  void DoFetch(Session& session, FetchRequest request, const OperationTrace& trace,
               Completion<std::vector<FetchResult>> done);
  absl::Status PrepareItem(Session& session, const FetchRequest& request, const FetchItem& item,
                           ServeWork& work);
  absl::Status RunServe(ServeWork& work);
  absl::Status EnqueueServe(ServeWork& work, gpu::Batch batch, gpu::Batch beginning);
  void CountServed(const ServeWork& work, uint64_t gathered_bytes);
  absl::Status StageServed(const ServeWork& work, const ServeTensors& tensors);
  absl::Status TakeServed(ServeWork& work, size_t index, const gpu::BatchSlot& slot);
  void FinishServe(const std::shared_ptr<ServeWork>& work, absl::Status status);

  const CoreOptions options_;
  const std::unique_ptr<gpu::Device> device_;
  const std::unique_ptr<HostPool> pool_;
  HostAccounts accounts_;  // the core's own
  const absl::Time started_;
  std::unique_ptr<gpu::Stream> stage_stream_, serve_stream_, memory_stream_, audit_stream_;
  SlowLog slow_log_;
  std::unique_ptr<ServeTensors> serve_tensors_;  // of the serve thread
  std::unique_ptr<gpu::DeviceMemory> probe_;     // of the memory thread

  // The core's own.
  std::map<SessionId, std::unique_ptr<Session>> sessions_;
  std::unordered_map<std::string, SessionId> tokens_;
  SessionId next_session_ = 1;
  SequenceId next_sequence_ = 1;
  uint32_t next_generation_ = 1;
  uint64_t gpu_used_bytes_ = 0;
  uint64_t served_calls_ = 0;
  bool auditing_ = false;
  absl::Time next_audit_ = absl::InfinitePast();
  bool draining_ = false;
  DeviceWatch device_watch_;
  absl::Time last_tick_;
  std::function<void()> idle_;
  // Chunks that could not be cleaned, and whose they are.
  std::vector<std::pair<PoolChunk, std::shared_ptr<HostAccount>>> unclean_;
  DaemonStatus counters_;     // the cumulative parts
  DaemonStatus next_status_;  // room for the next snapshot: each call of a layer makes one
  std::atomic<uint64_t> next_waiter_{1};
  std::atomic<uint64_t> rejected_attaches_{0};

  mutable std::mutex status_mu_;
  DaemonStatus status_;      // guarded by status_mu_
  absl::Time status_taken_;  // guarded by status_mu_

  // Last, so that their threads end before what they use. See Stop for the order.
  TaskQueue core_, stage_, serve_, memory_, audit_;
  std::unique_ptr<ClusterScheduler> scheduler_;
};

template <typename T>
void ServiceCore::Call(Completion<T> done, std::function<void(Completion<T>)> call) {
  if (!core_.TryPost([done, call = std::move(call)] { call(done); })) {
    done(absl::ResourceExhaustedError("the daemon's request queue is full or it is stopping"));
  }
}

}  // namespace clusterkv::service
