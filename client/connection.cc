#include "client/connection.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"
#include "clusterkv/v1/clusterkv.grpc.pb.h"

namespace clusterkv::client {
namespace {

constexpr char kRequestIdKey[] = "x-request-id";

// As the daemon logs it (x-request-id). Each connection has a beginning of its own, so that its ids
// are those of no other process.
class RequestIds {
 public:
  RequestIds() {
    std::random_device random;
    beginning_ = absl::StrCat(absl::Hex(random(), absl::kZeroPad8));
  }
  std::string Next() { return absl::StrCat(beginning_, "-", next_++); }

 private:
  std::string beginning_;
  std::atomic<uint64_t> next_{1};
};

std::string WithId(const std::string& what, const std::string& request_id) {
  return absl::StrCat(what, " (request ", request_id, ")");
}

class GrpcSessionCall final : public SessionCall {
 public:
  GrpcSessionCall(v1::ClusterKv::Stub& stub, const std::string& address,
                  const std::string& request_id)
      : what_(WithId(absl::StrCat("Session with ", address), request_id)),
        stream_(Open(stub, context_, request_id)) {}

  bool Write(const v1::SessionRequest& request) override { return stream_->Write(request); }
  bool Read(v1::SessionEvent* event) override { return stream_->Read(event); }
  void WritesDone() override { stream_->WritesDone(); }
  absl::Status Finish() override { return FromGrpc(stream_->Finish(), what_); }
  void Cancel() override { context_.TryCancel(); }

 private:
  using Stream = grpc::ClientReaderWriter<v1::SessionRequest, v1::SessionEvent>;

  // Metadata goes with the first write: sent by itself it would wait here for the connection, and
  // with a wedged daemon that takes 20 s.
  static std::unique_ptr<Stream> Open(v1::ClusterKv::Stub& stub, grpc::ClientContext& context,
                                      const std::string& request_id) {
    context.AddMetadata(kRequestIdKey, request_id);
    context.set_initial_metadata_corked(true);
    return stub.Session(&context);
  }

  const std::string what_;
  grpc::ClientContext context_;
  const std::unique_ptr<Stream> stream_;
};

// Outputs of a served step and selections come inline: the default limit of 4 MiB is for requests.
constexpr int kMaxReceiveBytes = 256 << 20;

grpc::ChannelArguments ChannelSettings() {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxReceiveBytes);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // Sessions must not share a connection, or one's flow control would slow the other.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return arguments;
}

}  // namespace

struct Connection::Stubs {
  std::unique_ptr<v1::ClusterKv::Stub> stub;
  RequestIds ids;

  template <typename Request, typename Reply>
  using Method = grpc::Status (v1::ClusterKv::Stub::*)(grpc::ClientContext*, const Request&,
                                                       Reply*);

  template <typename Request, typename Reply>
  absl::StatusOr<Reply> Call(Method<Request, Reply> method, const std::string& what,
                             const Request& request, const Deadline& deadline) {
    grpc::ClientContext context;
    const std::string id = ids.Next();
    context.AddMetadata(kRequestIdKey, id);
    context.set_deadline(std::chrono::system_clock::now() +
                         absl::ToChronoMicroseconds(deadline.remaining()));
    Reply reply;
    const grpc::Status status = (stub.get()->*method)(&context, request, &reply);
    if (!status.ok()) return FromGrpc(status, WithId(what, id));
    return reply;
  }
};

absl::StatusOr<std::unique_ptr<Connection>> Connection::Create(const std::string& address) {
  if (address.empty() || address == "unix:") {
    return absl::InvalidArgumentError(
        absl::StrCat("address is \"", address, "\"; allowed: unix:PATH or HOST:PORT"));
  }
  auto stubs = std::make_unique<Stubs>();
  stubs->stub = v1::ClusterKv::NewStub(
      grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), ChannelSettings()));
  return std::unique_ptr<Connection>(new Connection(address, std::move(stubs)));
}

Connection::Connection(std::string address, std::unique_ptr<Stubs> stubs)
    : address_(std::move(address)), stubs_(std::move(stubs)) {}

Connection::~Connection() = default;

std::string Connection::NextRequestId() { return stubs_->ids.Next(); }

std::string Connection::Describe(const char* call, const std::string& request_id) const {
  return WithId(absl::StrCat(call, " at ", address_), request_id);
}

std::unique_ptr<SessionCall> Connection::OpenSession() {
  return std::make_unique<GrpcSessionCall>(*stubs_->stub, address_, stubs_->ids.Next());
}

absl::StatusOr<v1::AllocateArenaReply> Connection::AllocateArena(
    const v1::AllocateArenaRequest& request, const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::AllocateArena,
                      absl::StrCat("AllocateArena at ", address_), request, deadline);
}

absl::StatusOr<v1::RegisterSequenceReply> Connection::RegisterSequence(
    const v1::RegisterSequenceRequest& request, const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::RegisterSequence,
                      absl::StrCat("RegisterSequence at ", address_), request, deadline);
}

absl::StatusOr<v1::IngestTokensReply> Connection::IngestTokens(
    const v1::IngestTokensRequest& request, const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::IngestTokens,
                      absl::StrCat("IngestTokens at ", address_), request, deadline);
}

absl::StatusOr<v1::WaitPublishedReply> Connection::WaitPublished(
    const v1::WaitPublishedRequest& request, const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::WaitPublished,
                      absl::StrCat("WaitPublished at ", address_), request, deadline);
}

absl::StatusOr<v1::FetchClustersReply> Connection::FetchClusters(
    const v1::FetchClustersRequest& request, const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::FetchClusters,
                      absl::StrCat("FetchClusters at ", address_), request, deadline);
}

absl::StatusOr<v1::AuditStepReply> Connection::AuditStep(const v1::AuditStepRequest& request,
                                                         const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::AuditStep, absl::StrCat("AuditStep at ", address_),
                      request, deadline);
}

absl::StatusOr<v1::ReleaseSequenceReply> Connection::ReleaseSequence(
    const v1::ReleaseSequenceRequest& request, const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::ReleaseSequence,
                      absl::StrCat("ReleaseSequence at ", address_), request, deadline);
}

absl::StatusOr<v1::ListSequencesReply> Connection::ListSequences(
    const v1::ListSequencesRequest& request, const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::ListSequences,
                      absl::StrCat("ListSequences at ", address_), request, deadline);
}

absl::StatusOr<v1::GetStatusReply> Connection::GetStatus(const v1::GetStatusRequest& request,
                                                         const Deadline& deadline) {
  return stubs_->Call(&v1::ClusterKv::Stub::GetStatus, absl::StrCat("GetStatus at ", address_),
                      request, deadline);
}

}  // namespace clusterkv::client
