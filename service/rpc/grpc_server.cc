#include "service/rpc/grpc_server.h"

#include <fmt/format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <sys/stat.h>
#include <unistd.h>

#include <mutex>
#include <utility>

#include "gpu/status_macros.h"
#include "gpu/unique_fd.h"
#include "service/rpc/cluster_kv_service.h"
#include "service/rpc/rpc_counters.h"
#include "service/socket_lock.h"

namespace clusterkv::service {
namespace {

constexpr char kUnixPrefix[] = "unix:";
constexpr int kMaxMessageBytes = 4 << 20;

class GrpcServerImpl : public GrpcServer {
 public:
  GrpcServerImpl(ServiceCore& core, const std::string& attach_path)
      : service_(core, counters_, attach_path) {}
  ~GrpcServerImpl() override { Shutdown(absl::ZeroDuration()); }

  absl::Status Start(const std::string& listen) {
    address_ = listen;
    const bool local = listen.starts_with(kUnixPrefix);
    if (local) {
      const std::string path = listen.substr(sizeof(kUnixPrefix) - 1);
      CKV_ASSIGN_OR_RETURN(lock_, LockSocketPath("listen", path));
      unlink(path.c_str());
    }
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    int port = 0;
    builder.AddListeningPort(listen, grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    const mode_t before = umask(0117);
    server_ = builder.BuildAndStart();
    umask(before);
    if (server_ == nullptr || (!local && port == 0)) {
      server_.reset();
      return absl::UnavailableError(fmt::format("listen: cannot bind {}", listen));
    }
    if (!local) address_ = listen.substr(0, listen.rfind(':') + 1) + std::to_string(port);
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }
  std::vector<RpcStatus> calls() const override { return counters_.status(); }

  void SetServing(bool serving) override {
    if (auto* health = server_->GetHealthCheckService()) {
      health->SetServingStatus(serving);
      health->SetServingStatus("clusterkv.v1.ClusterKv", serving);
    }
  }

  void Shutdown(absl::Duration timeout) override {
    std::call_once(once_, [&] {
      if (server_ == nullptr) return;
      server_->Shutdown(absl::ToChronoTime(absl::Now() + timeout));
      server_->Wait();
    });
  }

 private:
  RpcCounters counters_;
  ClusterKvService service_;
  gpu::UniqueFd lock_;  // released after the server has removed its socket
  std::string address_;
  std::once_flag once_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Create(const std::string& listen,
                                                               const std::string& attach_path,
                                                               ServiceCore& core) {
  auto server = std::make_unique<GrpcServerImpl>(core, attach_path);
  CKV_RETURN_IF_ERROR(server->Start(listen));
  return std::unique_ptr<GrpcServer>(std::move(server));
}

}  // namespace clusterkv::service
