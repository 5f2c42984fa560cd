#include "service/rpc/cluster_kv_service.h"

#include <optional>
#include <utility>
#include <vector>

#include "service/recent_errors.h"
#include "service/rpc/convert.h"
#include "service/rpc/grpc_status.h"
#include "service/rpc/request_id.h"
#include "service/rpc/session_reactor.h"

namespace clusterkv::service {
namespace {

// A unary call with an id, counted. Deletes itself when gRPC is done with it.
class Call : public CountedReactor<grpc::ServerUnaryReactor> {
 public:
  Call(RpcCounters& counters, grpc::CallbackServerContext& context, GrantId grant,
       const char* method)
      : CountedReactor(counters, method),
        context_(context),
        grant_(grant),
        method_(method),
        request_id_(RequestId(context)) {}

  // False: its id is refused, and it has ended.
  bool Admitted() {
    if (request_id_.ok()) return true;
    End(request_id_.status());
    return false;
  }
  SessionKey Key(const v1::SessionRef& session) const {
    SessionKey key = FromProto(session);
    key.grant = grant_;
    key.request_id = *request_id_;
    return key;
  }
  // A failure is logged with the call's id, and told with it.
  void End(const absl::Status& status) {
    if (!status.ok()) {
      LogFailedCall(method_, request_id_.value_or("refused"), status);
      if (request_id_.ok()) context_.AddTrailingMetadata(kRequestIdKey, *request_id_);
    }
    Answer(ToGrpcStatus(status));
  }
  void OnDone() override { delete this; }

 private:
  grpc::CallbackServerContext& context_;  // lives until OnDone
  const GrantId grant_;
  const char* const method_;
  const absl::StatusOr<std::string> request_id_;
};

// A call that the core completes.
class CoreCall : public Call {
 public:
  using Call::Call;

  // `fill` writes the reply of a success; the reply lives until Finish.
  template <typename T, typename Fill>
  Completion<T> Complete(Fill fill) {
    return [this, fill](absl::StatusOr<T> result) {
      const absl::Status status = result.status();
      if (result.ok()) fill(*std::move(result));
      End(status);
    };
  }
};

// WaitPublished can outlast its caller: cancelling takes the waiter back. gRPC calls OnCancel and
// OnDone only after the handler has returned the reactor, so after Start.
class WaitCall : public Call {
 public:
  WaitCall(RpcCounters& counters, grpc::CallbackServerContext& context, GrantId grant,
           ServiceCore& core)
      : Call(counters, context, grant, "WaitPublished"), core_(core) {}

  void Start(const v1::WaitPublishedRequest& request, v1::WaitPublishedReply& reply) {
    waiter_ = core_.WaitPublished(Key(request.session()), request.sequence_id(), request.length(),
                                  [this, &reply](const absl::StatusOr<PublishedInfo>& info) {
                                    if (info.ok()) {
                                      reply.set_published_segments(info->segments);
                                      reply.set_cut(info->cut);
                                    }
                                    End(info.status());
                                  });
  }
  void OnCancel() override { core_.CancelWait(waiter_); }

 private:
  ServiceCore& core_;
  uint64_t waiter_ = 0;
};

}  // namespace

grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionEvent>* ClusterKvService::Session(
    grpc::CallbackServerContext* context) {
  return new SessionReactor(counters_, core_, *context, attach_path_, grant_);
}

grpc::ServerUnaryReactor* ClusterKvService::AllocateArena(grpc::CallbackServerContext* context,
                                                          const v1::AllocateArenaRequest* request,
                                                          v1::AllocateArenaReply* reply) {
  auto* call = new CoreCall(counters_, *context, grant_, "AllocateArena");
  if (!call->Admitted()) return call;
  reply->set_boot_epoch(core_.boot_epoch());
  core_.AllocateArena(call->Key(request->session()), request->bytes(),
                      call->Complete<ArenaInfo>([reply](const ArenaInfo& info) {
                        reply->set_arena_id(info.arena);
                        reply->set_bytes(info.bytes);
                      }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::RegisterSequence(
    grpc::CallbackServerContext* context, const v1::RegisterSequenceRequest* request,
    v1::RegisterSequenceReply* reply) {
  auto* call = new CoreCall(counters_, *context, grant_, "RegisterSequence");
  if (!call->Admitted()) return call;
  reply->set_boot_epoch(core_.boot_epoch());
  auto converted = FromProto(*request);
  if (!converted.ok()) {
    call->End(converted.status());
    return call;
  }
  core_.RegisterSequence(call->Key(request->session()), *converted,
                         call->Complete<RegisterReply>([reply](const RegisterReply& registered) {
                           reply->set_sequence_id(registered.sequence);
                           reply->set_state_arena_id(registered.state_arena);
                           reply->set_state_bytes(registered.state_bytes);
                           reply->set_generation(registered.generation);
                         }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::IngestTokens(grpc::CallbackServerContext* context,
                                                         const v1::IngestTokensRequest* request,
                                                         v1::IngestTokensReply* reply) {
  auto* call = new CoreCall(counters_, *context, grant_, "IngestTokens");
  if (!call->Admitted()) return call;
  reply->set_boot_epoch(core_.boot_epoch());
  core_.IngestTokens(
      call->Key(request->session()), FromProto(*request),
      call->Complete<uint32_t>([reply](uint32_t tokens) { reply->set_ingested_tokens(tokens); }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::WaitPublished(grpc::CallbackServerContext* context,
                                                          const v1::WaitPublishedRequest* request,
                                                          v1::WaitPublishedReply* reply) {
  auto* call = new WaitCall(counters_, *context, grant_, core_);
  if (!call->Admitted()) return call;
  reply->set_boot_epoch(core_.boot_epoch());
  call->Start(*request, *reply);
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::FetchClusters(grpc::CallbackServerContext* context,
                                                          const v1::FetchClustersRequest* request,
                                                          v1::FetchClustersReply* reply) {
  auto* call = new CoreCall(counters_, *context, grant_, "FetchClusters");
  if (!call->Admitted()) return call;
  reply->set_boot_epoch(core_.boot_epoch());
  auto converted = FromProto(*request);
  if (!converted.ok()) {
    call->End(converted.status());
    return call;
  }
  core_.FetchClusters(
      call->Key(request->session()), *std::move(converted),
      call->Complete<std::vector<FetchResult>>([reply](std::vector<FetchResult> results) {
        for (FetchResult& result : results) {
          ToProto(std::move(result), *reply->add_results());
        }
      }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::AuditStep(grpc::CallbackServerContext* context,
                                                      const v1::AuditStepRequest* request,
                                                      v1::AuditStepReply* reply) {
  auto* call = new CoreCall(counters_, *context, grant_, "AuditStep");
  if (!call->Admitted()) return call;
  reply->set_boot_epoch(core_.boot_epoch());
  auto converted = FromProto(*request);
  if (!converted.ok()) {
    call->End(converted.status());
    return call;
  }
  core_.AuditDecodeStep(
      call->Key(request->session()), *std::move(converted),
      call->Complete<bool>([reply](bool audited) { reply->set_audited(audited); }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::ReleaseSequence(
    grpc::CallbackServerContext* context, const v1::ReleaseSequenceRequest* request,
    v1::ReleaseSequenceReply* reply) {
  auto* call = new CoreCall(counters_, *context, grant_, "ReleaseSequence");
  if (!call->Admitted()) return call;
  reply->set_boot_epoch(core_.boot_epoch());
  core_.ReleaseSequence(call->Key(request->session()), request->sequence_id(),
                        call->Complete<bool>([](bool) {}));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::ListSequences(grpc::CallbackServerContext* context,
                                                          const v1::ListSequencesRequest* request,
                                                          v1::ListSequencesReply* reply) {
  auto* call = new CoreCall(counters_, *context, grant_, "ListSequences");
  if (!call->Admitted()) return call;
  reply->set_boot_epoch(core_.boot_epoch());
  std::optional<SessionKey> key;
  if (request->has_session()) key = call->Key(request->session());
  core_.ListSequences(
      std::move(key),
      call->Complete<std::vector<SequenceStatus>>([reply](const std::vector<SequenceStatus>& list) {
        for (const SequenceStatus& status : list) ToProto(status, *reply->add_sequences());
      }),
      grant_);
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::GetStatus(grpc::CallbackServerContext* context,
                                                      const v1::GetStatusRequest* request,
                                                      v1::GetStatusReply* reply) {
  auto* call = new CoreCall(counters_, *context, grant_, "GetStatus");
  if (!call->Admitted()) return call;
  ToProto(StatusOfGrant(core_.status(), grant_), *reply);
  // They tell of everyone.
  if (request->want_recent_errors() && grant_ == kNoGrant) {
    for (const RecentError& error : DaemonErrors().List()) {
      ToProto(error, *reply->add_recent_errors());
    }
  }
  call->End(absl::OkStatus());
  return call;
}

}  // namespace clusterkv::service
