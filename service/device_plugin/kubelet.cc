#include "service/device_plugin/kubelet.h"

#include <grpcpp/create_channel.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <chrono>
#include <cstring>

#include "gpu/unique_fd.h"
#include "service/device_plugin/plugin_service.h"

namespace clusterkv::service {
namespace {

constexpr auto kRegisterTimeout = std::chrono::seconds(5);

}  // namespace

std::optional<FileIdentity> IdentityOf(const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) return std::nullopt;
  return FileIdentity{
      .device = status.st_dev,
      .inode = status.st_ino,
      .changed_nanoseconds = status.st_ctim.tv_sec * 1'000'000'000 + status.st_ctim.tv_nsec};
}

bool Answers(const std::string& socket_path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket_path.size() >= sizeof(address.sun_path)) return false;
  std::memcpy(address.sun_path, socket_path.data(), socket_path.size());
  const gpu::UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  return connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 ||
         errno == EAGAIN;  // so many that they wait
}

absl::Status RegisterWithKubelet(const std::string& socket_path, const std::string& endpoint) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // A connection of its own: after a restart the old one must not be waited for.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto stub = v1beta1::Registration::NewStub(grpc::CreateCustomChannel(
      "unix:" + socket_path, grpc::InsecureChannelCredentials(), arguments));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kRegisterTimeout);
  v1beta1::RegisterRequest request;
  request.set_version(kDevicePluginVersion);
  request.set_endpoint(endpoint);
  request.set_resource_name(kResourceName);
  *request.mutable_options() = PluginOptions();
  v1beta1::Empty reply;
  const grpc::Status status = stub->Register(&context, request, &reply);
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace clusterkv::service
