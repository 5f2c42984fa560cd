#include "service/rpc/rpc_counters.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "clusterkv/v1/clusterkv.grpc.pb.h"

namespace clusterkv::service {
namespace {

const char* TypeOf(const google::protobuf::MethodDescriptor& method) {
  if (method.client_streaming() && method.server_streaming()) return "bidi_stream";
  if (method.client_streaming()) return "client_stream";
  return method.server_streaming() ? "server_stream" : "unary";
}

std::vector<RpcStatus> AllMethods() {
  const auto* const service = google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(
      v1::ClusterKv::service_full_name());
  if (service == nullptr) std::abort();  // linked in, see daemon.cmake
  std::vector<RpcStatus> methods;
  for (int i = 0; i < service->method_count(); ++i) {
    RpcStatus& method = methods.emplace_back();
    method.service = service->full_name();
    method.method = service->method(i)->name();
    method.type = TypeOf(*service->method(i));
  }
  return methods;
}

std::vector<std::string> Names(const std::vector<RpcStatus>& methods) {
  std::vector<std::string> names;
  names.reserve(methods.size());
  for (const RpcStatus& method : methods) names.push_back(method.method);
  return names;
}

}  // namespace

RpcCounters::RpcCounters() : names_(Names(AllMethods())), methods_(AllMethods()) {}

size_t RpcCounters::IndexOf(std::string_view method) const {
  const auto found = std::ranges::find(names_, method);
  if (found == names_.end()) std::abort();
  return static_cast<size_t>(found - names_.begin());
}

void RpcCounters::Started(size_t method) {
  std::lock_guard lock(mu_);
  ++methods_[method].started;
}

void RpcCounters::Handled(size_t method, grpc::StatusCode code, double seconds) {
  const auto index = static_cast<size_t>(code);
  std::lock_guard lock(mu_);
  RpcStatus& counted = methods_[method];
  ++counted.handled[index < kGrpcCodes ? index : static_cast<size_t>(grpc::UNKNOWN)];
  counted.seconds.Observe(seconds);
}

std::vector<RpcStatus> RpcCounters::status() const {
  std::lock_guard lock(mu_);
  return methods_;
}

}  // namespace clusterkv::service
