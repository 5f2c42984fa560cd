#include "service/core.h"

#include <fmt/format.h>
#include <sys/random.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "gpu/status_macros.h"
#include "service/logging.h"

namespace clusterkv::service {
namespace {

constexpr uint32_t kProtocolVersion = 1;
constexpr size_t kMaxNameBytes = 128;
constexpr size_t kMaxLayoutVersions = 64;
constexpr uint32_t kMaxWorldSize = 1024;
constexpr size_t kTokenBytes = 16;
constexpr size_t kQueueCapacity = 65536;

std::string RandomToken() {
  std::string token(kTokenBytes, '\0');
  if (getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) std::abort();
  return token;
}

absl::Status CheckHello(const HelloInfo& hello) {
  if (hello.client_name.size() > kMaxNameBytes) {
    return absl::InvalidArgumentError(fmt::format("client_name has {} bytes, at most {}",
                                                  hello.client_name.size(), kMaxNameBytes));
  }
  if (hello.protocol_version_min > kProtocolVersion ||
      hello.protocol_version_max < kProtocolVersion) {
    return absl::FailedPreconditionError(
        fmt::format("protocol versions {} to {} offered, this daemon speaks {}",
                    hello.protocol_version_min, hello.protocol_version_max, kProtocolVersion));
  }
  if (hello.state_layout_versions.size() > kMaxLayoutVersions) {
    return absl::InvalidArgumentError(fmt::format("{} state layout versions offered, at most {}",
                                                  hello.state_layout_versions.size(),
                                                  kMaxLayoutVersions));
  }
  if (std::ranges::find(hello.state_layout_versions, gpu::kStateLayoutVersion) ==
      hello.state_layout_versions.end()) {
    return absl::FailedPreconditionError(
        fmt::format("state layout versions [{}] offered, this daemon writes {}",
                    fmt::join(hello.state_layout_versions, ", "), gpu::kStateLayoutVersion));
  }
  if (!hello.group) return absl::OkStatus();
  const SessionGroup& group = *hello.group;
  if (group.id.size() > kMaxNameBytes || group.world_size == 0 ||
      group.world_size > kMaxWorldSize || group.rank >= group.world_size) {
    return absl::InvalidArgumentError(
        fmt::format("group: rank {} of world_size {} with an id of {} bytes; rank < world_size, "
                    "world_size 1 to {}, id at most {} bytes",
                    group.rank, group.world_size, group.id.size(), kMaxWorldSize, kMaxNameBytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<ServiceCore>> ServiceCore::Create(
    CoreOptions options, std::unique_ptr<gpu::Device> device, std::unique_ptr<HostPool> pool) {
  auto core = std::unique_ptr<ServiceCore>(
      new ServiceCore(std::move(options), std::move(device), std::move(pool)));
  CKV_RETURN_IF_ERROR(core->Start());
  return core;
}

ServiceCore::ServiceCore(CoreOptions options, std::unique_ptr<gpu::Device> device,
                         std::unique_ptr<HostPool> pool)
    : options_(std::move(options)),
      device_(std::move(device)),
      pool_(std::move(pool)),
      accounts_(*pool_, options_.offered_bytes),
      started_(options_.now()),
      slow_log_(options_.slow_operation),
      device_watch_(started_),
      last_tick_(started_),
      core_("ckv-core", kQueueCapacity, absl::ToChronoMicroseconds(options_.poll)),
      stage_("ckv-stage", SIZE_MAX),
      serve_("ckv-serve", SIZE_MAX, absl::ToChronoMicroseconds(options_.poll)),
      memory_("ckv-memory", SIZE_MAX),
      audit_("ckv-audit", SIZE_MAX) {}

absl::Status ServiceCore::Start() {
  CKV_ASSIGN_OR_RETURN(stage_stream_, device_->CreateStream("stage"));
  CKV_ASSIGN_OR_RETURN(serve_stream_, device_->CreateStream("serve"));
  CKV_ASSIGN_OR_RETURN(probe_, device_->Allocate(sizeof(uint64_t)));
  serve_tensors_ = std::make_unique<ServeTensors>(*device_);
  CKV_ASSIGN_OR_RETURN(memory_stream_, device_->CreateStream("memory"));
  CKV_ASSIGN_OR_RETURN(audit_stream_, device_->CreateStream("audit"));
  CKV_ASSIGN_OR_RETURN(scheduler_, ClusterScheduler::Create(*device_, slow_log_));
  MeasureHostMemory();
  PublishStatus();
  return absl::OkStatus();
}

ServiceCore::~ServiceCore() { Stop(); }

void ServiceCore::EndAllSessions() {
  core_.Post([this] {
    draining_ = true;
    std::vector<Session*> open;  // ending one may erase it
    for (auto& [id, session] : sessions_) {
      if (!session->over) open.push_back(session.get());
    }
    for (Session* session : open) {
      End(*session, SessionEnd::kDaemonStopped, absl::UnavailableError("the daemon is stopping"));
    }
  });
}

void ServiceCore::Stop() {
  EndAllSessions();
  core_.Drain();  // no call finds a session any more, so no new work reaches the other queues
  stage_.Stop();
  serve_.Stop();
  audit_.Stop();
  if (scheduler_) scheduler_->Stop();
  // What was in flight answers its callers, then frees its memory on the memory thread.
  memory_.Drain();
  core_.Drain();
  memory_.Stop();
  core_.Stop();
}

// --- Sessions ---------------------------------------------------------------------------------

void ServiceCore::OpenSession(HelloInfo hello, std::shared_ptr<SessionSink> sink,
                              Completion<WelcomeInfo> done) {
  Call<WelcomeInfo>(std::move(done), [this, hello = std::move(hello), sink = std::move(sink)](
                                         const Completion<WelcomeInfo>& reply) {
    if (absl::Status bad = CheckHello(hello); !bad.ok()) return reply(bad);
    if (draining_) return reply(absl::UnavailableError("the daemon is draining"));
    const std::shared_ptr<HostAccount> account = accounts_.Find(hello.grant);
    if (account == nullptr) {
      return reply(absl::FailedPreconditionError(
          fmt::format("grant {} was revoked", GrantText(hello.grant))));
    }
    const auto live = std::ranges::count_if(sessions_, [&](auto& s) {
      return !s.second->over && s.second->hello.grant == hello.grant;
    });
    if (static_cast<size_t>(live) >= options_.max_sessions) {
      CountRefused(Limit::kSessions);
      return reply(absl::ResourceExhaustedError(
          fmt::format("{} sessions are open, the most there may be", live)));
    }
    auto session = std::make_unique<Session>();
    session->id = next_session_++;
    session->token = RandomToken();
    session->hello = hello;
    session->sink = sink;
    session->opened = options_.now();
    session->pool = pool_.get();
    session->account = account;
    session->memory = std::make_unique<SessionMemory>(*account, *session);
    session->chunk_addresses = std::make_unique<const std::byte*[]>(kMaxSessionChunks);
    const WelcomeInfo welcome{.protocol_version = kProtocolVersion,
                              .state_layout_version = gpu::kStateLayoutVersion,
                              .session = session->id,
                              .token = session->token};
    tokens_[session->token] = session->id;
    sessions_[session->id] = std::move(session);
    ++counters_.sessions_started;
    LogInfo("session opened", {{"session", welcome.session},
                               {"client", hello.client_name},
                               {"grant", hello.grant == kNoGrant ? "none" : GrantText(hello.grant)},
                               {"request_id", hello.request_id}});
    PublishStatus();
    reply(welcome);
  });
}

void ServiceCore::EndSession(SessionId id, absl::Status why, SessionEnd reason) {
  core_.Post([this, id, why = std::move(why), reason] {
    const auto found = sessions_.find(id);
    if (found == sessions_.end() || found->second->over) return;
    End(*found->second, why.ok() ? SessionEnd::kClosed : reason, why);
  });
}

void ServiceCore::Attach(SessionKey key, PeerCredentials peer, std::shared_ptr<AttachSink> sink,
                         Completion<SessionId> done) {
  Call<SessionId>(std::move(done), [this, key = std::move(key), peer,
                                    sink = std::move(sink)](const Completion<SessionId>& reply) {
    auto session = FindSession(key, /*attached=*/false);
    if (!session.ok()) return reply(session.status());
    if ((*session)->was_attached) {
      return reply(
          absl::AlreadyExistsError(fmt::format("session {} has attached already", (*session)->id)));
    }
    (*session)->attach = sink;
    (*session)->was_attached = true;
    (*session)->peer = peer;
    LogInfo("session attached",
            {{"session", (*session)->id}, {"pid", peer.pid}, {"uid", peer.uid}});
    PublishStatus();
    reply((*session)->id);
  });
}

void ServiceCore::ChunkMapped(SessionId id, uint32_t chunk) {
  core_.Post([this, id, chunk] {
    const auto found = sessions_.find(id);
    if (found == sessions_.end() || found->second->over) return;
    Session& session = *found->second;
    if (absl::Status bad = session.memory->ConfirmMapped(chunk); !bad.ok()) {
      return End(session, SessionEnd::kProtocolError, absl::AbortedError(bad.message()));
    }
    for (auto& [sequence_id, sequence] : session.sequences) MaybePublish(*sequence);
  });
}

void ServiceCore::ChunkUnmapped(SessionId id, uint32_t chunk) {
  core_.Post([this, id, chunk] {
    const auto found = sessions_.find(id);
    if (found == sessions_.end() || found->second->over) return;
    Session& session = *found->second;
    if (absl::Status bad = session.memory->ConfirmUnmapped(chunk); !bad.ok()) {
      return End(session, SessionEnd::kProtocolError, absl::AbortedError(bad.message()));
    }
    RecycleReturned(session);
    PublishStatus();
  });
}

void ServiceCore::Goodbye(SessionId id) {
  core_.Post([this, id] {
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) return;
    found->second->worker_gone = true;
    if (!found->second->over) {
      return End(*found->second, SessionEnd::kClosed, absl::OkStatus());
    }
    FinishEnd(*found->second);
  });
}

void ServiceCore::WorkerDied(SessionId id) {
  core_.Post([this, id] {
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) return;
    found->second->worker_gone = true;
    if (!found->second->over) {
      return End(*found->second, SessionEnd::kWorkerDied,
                 absl::AbortedError("the worker process has died"));
    }
    FinishEnd(*found->second);
  });
}

absl::StatusOr<Session*> ServiceCore::FindSession(const SessionKey& key, bool attached) {
  if (key.boot_epoch != options_.boot_epoch) {
    return absl::FailedPreconditionError(
        fmt::format("boot epoch {} is not this daemon's, {}", key.boot_epoch, options_.boot_epoch));
  }
  const auto token = tokens_.find(key.token);
  // One of another grant is as unknown as one that never was.
  if (token == tokens_.end() || sessions_.at(token->second)->hello.grant != key.grant) {
    return absl::UnauthenticatedError("the session token is not one of a live session");
  }
  Session& session = *sessions_.at(token->second);
  if (attached && session.attach == nullptr) {
    return absl::FailedPreconditionError(
        fmt::format("session {} has not attached yet", session.id));
  }
  return &session;
}

absl::StatusOr<Sequence*> ServiceCore::FindSequence(Session& session, SequenceId id) {
  const auto found = session.sequences.find(id);
  if (found == session.sequences.end() || found->second->releasing ||
      found->second->state == nullptr) {
    return absl::NotFoundError(fmt::format("session {} has no sequence {}", session.id, id));
  }
  if (!found->second->failure.ok()) return found->second->failure;
  return found->second.get();
}

Sequence* ServiceCore::SequenceById(SessionId session, SequenceId id) {
  const auto found = sessions_.find(session);
  if (found == sessions_.end()) return nullptr;
  const auto sequence = found->second->sequences.find(id);
  return sequence == found->second->sequences.end() ? nullptr : sequence->second.get();
}

void ServiceCore::End(Session& session, SessionEnd reason, const absl::Status& why) {
  session.over = true;
  session.ending = OperationTrace(session.hello.request_id);
  ++counters_.sessions_ended[static_cast<size_t>(reason)];
  if (!why.ok()) ++counters_.sessions_ended_lost;
  (why.ok() ? LogInfo : LogWarning)(
      "session over", {{"session", session.id},
                       {"client", session.hello.client_name},
                       {"why", why.ok() ? std::string("closed") : std::string(why.message())},
                       {"reason", kSessionEndNames[static_cast<size_t>(reason)]},
                       {"request_id", session.hello.request_id}});
  tokens_.erase(session.token);
  if (session.sink) std::exchange(session.sink, nullptr)->Ended(why);
  if (session.attach) std::exchange(session.attach, nullptr)->SessionEnded();
  // Releasing erases from the map, and the last one would forget the session.
  ++session.in_flight;
  std::vector<Sequence*> sequences;
  for (auto& [id, sequence] : session.sequences) sequences.push_back(sequence.get());
  for (Sequence* sequence : sequences) {
    if (!sequence->releasing) Release(*sequence);
  }
  --session.in_flight;
  FinishEnd(session);
}

void ServiceCore::FinishEnd(Session& session) {
  if (!session.over || !session.sequences.empty() || session.in_flight > 0) return;
  if (!std::exchange(session.idle, true)) session.ending.End("in_flight_ms");
  for (auto& [id, arena] : session.arenas) {
    FreeSharedMemory(std::move(arena.memory), session, arena.bytes);
  }
  session.arenas.clear();
  session.memory->QuarantineAll();
  if (session.worker_gone || !session.was_attached) {
    session.memory->ReleaseAll();
    FreeKept(session);
  }
  RecycleReturned(session);
  session.chunk_addresses.reset();
  if (session.chunk_table != nullptr) DiscardMemory(std::move(session.chunk_table));
  if (session.memory->holds_nothing() && session.kept.empty()) {
    session.ending.End("give_back_ms");
    slow_log_.Report(SlowLog::kSessionEnd, session.ending, {{"session", session.id}});
    LogInfo("session freed", {{"session", session.id}});
    sessions_.erase(session.id);
  }
  PublishStatus();
  if (idle_ && std::ranges::all_of(sessions_, [](auto& s) { return s.second->over; })) {
    std::exchange(idle_, nullptr)();
  }
}

// --- Life -------------------------------------------------------------------------------------

void ServiceCore::Tick() {
  core_.Post([this] {
    last_tick_ = options_.now();
    std::vector<Session*> late;
    std::vector<Sequence*> sampled;
    for (auto& [id, session] : sessions_) {
      if (session->over) continue;
      if (!session->was_attached && options_.now() - session->opened > options_.attach_timeout) {
        late.push_back(session.get());
        continue;
      }
      for (auto& [sequence_id, sequence] : session->sequences) {
        if (!sequence->releasing && !sequence->sampling) sampled.push_back(sequence.get());
      }
    }
    TakeSamples(std::move(sampled));
    for (Session* session : late) {
      End(*session, SessionEnd::kAttachTimeout,
          absl::AbortedError("the worker did not attach in time"));
    }
    RecycleUnclean();
    MeasureHostMemory();
    ProbeDevice();
    PublishStatus();
  });
}

void ServiceCore::ProbeDevice() {
  if (!device_watch_.due()) return;
  device_watch_.Sent();
  memory_.Post([this] {
    uint64_t word = 0;
    absl::Status status = memory_stream_->CopyAsync(&word, probe_->data(), sizeof(word));
    const absl::Status passed = memory_stream_->Synchronize();
    if (status.ok()) status = passed;
    core_.Post([this, status] {
      device_watch_.Answered(status, options_.now());
      if (!status.ok()) LogError("device has failed", {{"why", std::string(status.message())}});
      PublishStatus();
    });
  });
}

void ServiceCore::Drain(absl::Duration timeout, std::function<void()> idle) {
  core_.Post([this, timeout, idle = std::move(idle)] {
    draining_ = true;
    PublishStatus();
    bool any = false;
    for (auto& [id, session] : sessions_) {
      if (session->over || session->sink == nullptr) continue;
      any = true;
      session->sink->Draining(static_cast<uint64_t>(absl::ToInt64Milliseconds(timeout)));
    }
    if (!any) return idle();
    idle_ = idle;
  });
}

}  // namespace clusterkv::service
