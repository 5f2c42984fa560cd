// The ClusterKv gRPC service: translates, nothing else. Reactions never block: the core answers
// through callbacks. gRPC does not tell by which socket a call came, so each grant's server has one
// of its own.
#pragma once

#include <string>
#include <utility>

#include "clusterkv/v1/clusterkv.grpc.pb.h"
#include "service/core.h"
#include "service/rpc/rpc_counters.h"

namespace clusterkv::service {

class ClusterKvService : public v1::ClusterKv::CallbackService {
 public:
  // `attach_path` is what workers are told. The core and the counters must outlive it.
  ClusterKvService(ServiceCore& core, RpcCounters& counters, std::string attach_path, GrantId grant)
      : core_(core), counters_(counters), attach_path_(std::move(attach_path)), grant_(grant) {}

  grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionEvent>* Session(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* AllocateArena(grpc::CallbackServerContext* context,
                                          const v1::AllocateArenaRequest* request,
                                          v1::AllocateArenaReply* reply) override;
  grpc::ServerUnaryReactor* RegisterSequence(grpc::CallbackServerContext* context,
                                             const v1::RegisterSequenceRequest* request,
                                             v1::RegisterSequenceReply* reply) override;
  grpc::ServerUnaryReactor* IngestTokens(grpc::CallbackServerContext* context,
                                         const v1::IngestTokensRequest* request,
                                         v1::IngestTokensReply* reply) override;
  grpc::ServerUnaryReactor* WaitPublished(grpc::CallbackServerContext* context,
                                          const v1::WaitPublishedRequest* request,
                                          v1::WaitPublishedReply* reply) override;
  grpc::ServerUnaryReactor* FetchClusters(grpc::CallbackServerContext* context,
                                          const v1::FetchClustersRequest* request,
                                          v1::FetchClustersReply* reply) override;
  grpc::ServerUnaryReactor* AuditStep(grpc::CallbackServerContext* context,
                                      const v1::AuditStepRequest* request,
                                      v1::AuditStepReply* reply) override;
  grpc::ServerUnaryReactor* ReleaseSequence(grpc::CallbackServerContext* context,
                                            const v1::ReleaseSequenceRequest* request,
                                            v1::ReleaseSequenceReply* reply) override;
  grpc::ServerUnaryReactor* ListSequences(grpc::CallbackServerContext* context,
                                          const v1::ListSequencesRequest* request,
                                          v1::ListSequencesReply* reply) override;
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context,
                                      const v1::GetStatusRequest* request,
                                      v1::GetStatusReply* reply) override;

 private:
  ServiceCore& core_;
  RpcCounters& counters_;
  const std::string attach_path_;
  const GrantId grant_;
};

}  // namespace clusterkv::service
