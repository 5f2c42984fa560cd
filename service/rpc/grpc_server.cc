#include "service/rpc/grpc_server.h"

#include <fmt/format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <mutex>
#include <utility>

#include "gpu/status_macros.h"
#include "gpu/unique_fd.h"
#include "service/rpc/cluster_kv_service.h"
#include "service/rpc/without_reflection.h"
#include "service/socket_lock.h"

namespace clusterkv::service {
namespace {

constexpr char kUnixPrefix[] = "unix:";
constexpr int kMaxMessageBytes = 4 << 20;
constexpr mode_t kGrantSocketMode = 0666;

class GrpcServerImpl : public GrpcServer {
 public:
  GrpcServerImpl(const GrpcServerOptions& options, ServiceCore& core, RpcCounters& calls)
      : options_(options),
        service_(core, calls, options.attach_path, options.grant),
        address_(options.listen) {}
  ~GrpcServerImpl() override { Shutdown(absl::ZeroDuration()); }

  absl::Status Start() {
    const std::string& listen = options_.listen;
    const bool local = listen.starts_with(kUnixPrefix);
    const bool granted = options_.grant != kNoGrant;
    const std::string path = local ? listen.substr(sizeof(kUnixPrefix) - 1) : "";
    if (local && !granted) {
      CKV_ASSIGN_OR_RETURN(lock_, LockSocketPath("listen", path));
    }
    if (local) unlink(path.c_str());
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    if (granted) builder.SetOption(std::make_unique<WithoutReflection>());
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    int port = 0;
    builder.AddListeningPort(listen, grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = granted ? builder.BuildAndStart() : BuildForTheGroup(builder);
    if (server_ == nullptr || (!local && port == 0)) {
      server_.reset();
      return absl::UnavailableError(fmt::format("listen: cannot bind {}", listen));
    }
    if (granted && chmod(path.c_str(), kGrantSocketMode) != 0) {
      return absl::ErrnoToStatus(errno, ("listen: cannot set the mode of " + path).c_str());
    }
    if (!local) address_ = listen.substr(0, listen.rfind(':') + 1) + std::to_string(port);
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

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
  // At start, before there are other threads that make files: the mask is the process's.
  static std::unique_ptr<grpc::Server> BuildForTheGroup(grpc::ServerBuilder& builder) {
    const mode_t before = umask(0117);
    auto server = builder.BuildAndStart();
    umask(before);
    return server;
  }

  const GrpcServerOptions options_;
  ClusterKvService service_;
  gpu::UniqueFd lock_;  // released after the server has removed its socket
  std::string address_;
  std::once_flag once_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Create(const GrpcServerOptions& options,
                                                               ServiceCore& core,
                                                               RpcCounters& calls) {
  auto server = std::make_unique<GrpcServerImpl>(options, core, calls);
  CKV_RETURN_IF_ERROR(server->Start());
  return std::unique_ptr<GrpcServer>(std::move(server));
}

}  // namespace clusterkv::service
