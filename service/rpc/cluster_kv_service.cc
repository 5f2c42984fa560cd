#include "service/rpc/cluster_kv_service.h"

#include <optional>
#include <utility>
#include <vector>

#include "service/rpc/convert.h"
#include "service/rpc/grpc_status.h"
#include "service/rpc/session_reactor.h"

namespace clusterkv::service {
namespace {

// A unary call that the core completes. Deletes itself when gRPC is done with it.
class CoreCall : public CountedReactor<grpc::ServerUnaryReactor> {
 public:
  using CountedReactor::CountedReactor;

  // `fill` writes the reply of a success; the reply lives until Finish.
  template <typename T, typename Fill>
  Completion<T> Complete(Fill fill) {
    return [this, fill](absl::StatusOr<T> result) {
      const grpc::Status status = ToGrpcStatus(result.status());
      if (result.ok()) fill(*std::move(result));
      Answer(status);
    };
  }
  void OnDone() override { delete this; }
};

// WaitPublished can outlast its caller: cancelling takes the waiter back. gRPC calls OnCancel and
// OnDone only after the handler has returned the reactor, so after Start.
class WaitCall : public CountedReactor<grpc::ServerUnaryReactor> {
 public:
  WaitCall(RpcCounters& counters, ServiceCore& core)
      : CountedReactor(counters, "WaitPublished"), core_(core) {}

  void Start(SessionKey key, const v1::WaitPublishedRequest& request,
             v1::WaitPublishedReply& reply) {
    waiter_ = core_.WaitPublished(std::move(key), request.sequence_id(), request.length(),
                                  [this, &reply](absl::StatusOr<PublishedInfo> info) {
                                    if (info.ok()) {
                                      reply.set_published_segments(info->segments);
                                      reply.set_cut(info->cut);
                                    }
                                    Answer(ToGrpcStatus(info.status()));
                                  });
  }
  void OnCancel() override { core_.CancelWait(waiter_); }
  void OnDone() override { delete this; }

 private:
  ServiceCore& core_;
  uint64_t waiter_ = 0;
};

}  // namespace

grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionEvent>* ClusterKvService::Session(
    grpc::CallbackServerContext* context) {
  return new SessionReactor(counters_, core_, *context, attach_path_, grant_);
}

SessionKey ClusterKvService::KeyOf(const v1::SessionRef& session) const {
  SessionKey key = FromProto(session);
  key.grant = grant_;
  return key;
}

grpc::ServerUnaryReactor* ClusterKvService::AllocateArena(grpc::CallbackServerContext*,
                                                          const v1::AllocateArenaRequest* request,
                                                          v1::AllocateArenaReply* reply) {
  auto* call = new CoreCall(counters_, "AllocateArena");
  reply->set_boot_epoch(core_.boot_epoch());
  core_.AllocateArena(KeyOf(request->session()), request->bytes(),
                      call->Complete<ArenaInfo>([reply](const ArenaInfo& info) {
                        reply->set_arena_id(info.arena);
                        reply->set_bytes(info.bytes);
                      }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::RegisterSequence(
    grpc::CallbackServerContext*, const v1::RegisterSequenceRequest* request,
    v1::RegisterSequenceReply* reply) {
  auto* call = new CoreCall(counters_, "RegisterSequence");
  reply->set_boot_epoch(core_.boot_epoch());
  auto converted = FromProto(*request);
  if (!converted.ok()) {
    call->Answer(ToGrpcStatus(converted.status()));
    return call;
  }
  core_.RegisterSequence(KeyOf(request->session()), *converted,
                         call->Complete<RegisterReply>([reply](const RegisterReply& registered) {
                           reply->set_sequence_id(registered.sequence);
                           reply->set_state_arena_id(registered.state_arena);
                           reply->set_state_bytes(registered.state_bytes);
                           reply->set_generation(registered.generation);
                         }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::IngestTokens(grpc::CallbackServerContext*,
                                                         const v1::IngestTokensRequest* request,
                                                         v1::IngestTokensReply* reply) {
  auto* call = new CoreCall(counters_, "IngestTokens");
  reply->set_boot_epoch(core_.boot_epoch());
  core_.IngestTokens(
      KeyOf(request->session()), FromProto(*request),
      call->Complete<uint32_t>([reply](uint32_t tokens) { reply->set_ingested_tokens(tokens); }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::WaitPublished(grpc::CallbackServerContext*,
                                                          const v1::WaitPublishedRequest* request,
                                                          v1::WaitPublishedReply* reply) {
  auto* call = new WaitCall(counters_, core_);
  reply->set_boot_epoch(core_.boot_epoch());
  call->Start(KeyOf(request->session()), *request, *reply);
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::FetchClusters(grpc::CallbackServerContext*,
                                                          const v1::FetchClustersRequest* request,
                                                          v1::FetchClustersReply* reply) {
  auto* call = new CoreCall(counters_, "FetchClusters");
  reply->set_boot_epoch(core_.boot_epoch());
  auto converted = FromProto(*request);
  if (!converted.ok()) {
    call->Answer(ToGrpcStatus(converted.status()));
    return call;
  }
  core_.FetchClusters(
      KeyOf(request->session()), *std::move(converted),
      call->Complete<std::vector<FetchResult>>([reply](std::vector<FetchResult> results) {
        for (FetchResult& result : results) {
          ToProto(std::move(result), *reply->add_results());
        }
      }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::AuditStep(grpc::CallbackServerContext*,
                                                      const v1::AuditStepRequest* request,
                                                      v1::AuditStepReply* reply) {
  auto* call = new CoreCall(counters_, "AuditStep");
  reply->set_boot_epoch(core_.boot_epoch());
  core_.AuditDecodeStep(
      FromProto(request->session()), FromProto(*request),
      call->Complete<bool>([reply](bool audited) { reply->set_audited(audited); }));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::ReleaseSequence(
    grpc::CallbackServerContext*, const v1::ReleaseSequenceRequest* request,
    v1::ReleaseSequenceReply* reply) {
  auto* call = new CoreCall(counters_, "ReleaseSequence");
  reply->set_boot_epoch(core_.boot_epoch());
  core_.ReleaseSequence(KeyOf(request->session()), request->sequence_id(),
                        call->Complete<bool>([](bool) {}));
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::ListSequences(grpc::CallbackServerContext*,
                                                          const v1::ListSequencesRequest* request,
                                                          v1::ListSequencesReply* reply) {
  auto* call = new CoreCall(counters_, "ListSequences");
  reply->set_boot_epoch(core_.boot_epoch());
  std::optional<SessionKey> key;
  if (request->has_session()) key = KeyOf(request->session());
  core_.ListSequences(
      std::move(key),
      call->Complete<std::vector<SequenceStatus>>([reply](const std::vector<SequenceStatus>& list) {
        for (const SequenceStatus& status : list) ToProto(status, *reply->add_sequences());
      }),
      grant_);
  return call;
}

grpc::ServerUnaryReactor* ClusterKvService::GetStatus(grpc::CallbackServerContext*,
                                                      const v1::GetStatusRequest*,
                                                      v1::GetStatusReply* reply) {
  auto* call = new CoreCall(counters_, "GetStatus");
  ToProto(StatusOfGrant(core_.status(), grant_), *reply);
  call->Answer(grpc::Status::OK);
  return call;
}

}  // namespace clusterkv::service
