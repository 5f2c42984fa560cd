#include "service/device_plugin/plugin_service.h"

#include <algorithm>
#include <utility>

#include "service/rpc/grant_servers.h"
#include "service/rpc/grpc_status.h"

namespace clusterkv::service {
namespace {

constexpr char kHealthy[] = "Healthy";
constexpr char kUnhealthy[] = "Unhealthy";

void Describe(const Grant& grant, v1beta1::ContainerAllocateResponse& reply) {
  (*reply.mutable_envs())[kAddressVariable] =
      std::string("unix:") + kContainerFolder + "/" + kGrantSocketName;
  (*reply.mutable_annotations())[kGrantAnnotation] = GrantText(grant.grant);
  v1beta1::Mount& mount = *reply.add_mounts();
  mount.set_container_path(kContainerFolder);
  mount.set_host_path(grant.folder);
  mount.set_read_only(true);  // which does not keep a socket from being connected to
}

}  // namespace

// One ListAndWatch stream. Deletes itself when gRPC is done with it.
class PluginService::Watch : public grpc::ServerWriteReactor<v1beta1::ListAndWatchResponse> {
 public:
  explicit Watch(PluginService& service) : service_(service) {}

  // The newest list; one that waits behind a write is replaced.
  void Send(List list) {
    std::lock_guard lock(mu_);
    if (finishing_) return;
    if (writing_ != nullptr) {
      next_ = std::move(list);
    } else {
      writing_ = std::move(list);
      StartWrite(writing_.get());
    }
  }
  void End() {
    std::lock_guard lock(mu_);
    if (std::exchange(finishing_, true) || writing_ != nullptr) return;
    Finish(grpc::Status::OK);
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mu_);
    writing_ = std::exchange(next_, nullptr);
    if (finishing_ || !ok) {
      finishing_ = true;
      writing_ = nullptr;
      Finish(grpc::Status::OK);
    } else if (writing_ != nullptr) {
      StartWrite(writing_.get());
    }
  }
  void OnCancel() override { End(); }
  void OnDone() override {
    {
      std::lock_guard lock(service_.mu_);
      service_.watches_.erase(this);
    }
    delete this;
  }

 private:
  PluginService& service_;
  std::mutex mu_;
  List writing_, next_;     // guarded by mu_
  bool finishing_ = false;  // guarded by mu_
};

v1beta1::DevicePluginOptions PluginOptions() {
  v1beta1::DevicePluginOptions options;
  options.set_get_preferred_allocation_available(true);
  return options;
}

PluginService::PluginService(const DeviceIds& devices, PluginRequests& requests)
    : devices_(devices), requests_(requests), list_(MakeList(false)) {}

PluginService::List PluginService::MakeList(bool healthy) const {
  auto list = std::make_shared<v1beta1::ListAndWatchResponse>();
  for (const std::string& id : devices_) {
    v1beta1::Device& device = *list->add_devices();
    device.set_id(id);
    device.set_health(healthy ? kHealthy : kUnhealthy);
  }
  return list;
}

void PluginService::SetHealthy(bool healthy) {
  std::lock_guard lock(mu_);
  if (std::exchange(healthy_, healthy) == healthy) return;
  list_ = MakeList(healthy);
  for (Watch* watch : watches_) watch->Send(list_);
}

size_t PluginService::watchers() const {
  std::lock_guard lock(mu_);
  return watches_.size();
}

void PluginService::EndWatches() {
  std::lock_guard lock(mu_);
  for (Watch* watch : watches_) watch->End();
}

grpc::ServerUnaryReactor* PluginService::GetDevicePluginOptions(
    grpc::CallbackServerContext* context, const v1beta1::Empty*,
    v1beta1::DevicePluginOptions* reply) {
  grpc::ServerUnaryReactor* const call = context->DefaultReactor();
  *reply = PluginOptions();
  call->Finish(grpc::Status::OK);
  return call;
}

grpc::ServerWriteReactor<v1beta1::ListAndWatchResponse>* PluginService::ListAndWatch(
    grpc::CallbackServerContext*, const v1beta1::Empty*) {
  auto* const watch = new Watch(*this);
  std::lock_guard lock(mu_);
  watches_.insert(watch);
  watch->Send(list_);
  return watch;
}

grpc::ServerUnaryReactor* PluginService::GetPreferredAllocation(
    grpc::CallbackServerContext* context, const v1beta1::PreferredAllocationRequest* request,
    v1beta1::PreferredAllocationResponse* reply) {
  grpc::ServerUnaryReactor* const call = context->DefaultReactor();
  std::vector<Preference> containers;
  for (const auto& container : request->container_requests()) {
    const auto& available = container.available_deviceids();
    const auto& included = container.must_include_deviceids();
    containers.push_back({.available = {available.begin(), available.end()},
                          .must_include = {included.begin(), included.end()},
                          .count = static_cast<size_t>(std::max(0, container.allocation_size()))});
  }
  requests_.Prefer(std::move(containers),
                   [call, reply](const absl::StatusOr<std::vector<DeviceIds>>& chosen) {
                     if (!chosen.ok()) return call->Finish(ToGrpcStatus(chosen.status()));
                     for (const DeviceIds& devices : *chosen) {
                       auto& container = *reply->add_container_responses();
                       for (const std::string& device : devices) container.add_deviceids(device);
                     }
                     call->Finish(grpc::Status::OK);
                   });
  return call;
}

grpc::ServerUnaryReactor* PluginService::Allocate(grpc::CallbackServerContext* context,
                                                  const v1beta1::AllocateRequest* request,
                                                  v1beta1::AllocateResponse* reply) {
  grpc::ServerUnaryReactor* const call = context->DefaultReactor();
  std::vector<DeviceIds> containers;
  for (const auto& container : request->container_requests()) {
    containers.emplace_back(container.devices_ids().begin(), container.devices_ids().end());
  }
  requests_.Allocate(std::move(containers),
                     [call, reply](const absl::StatusOr<std::vector<Grant>>& grants) {
                       if (!grants.ok()) return call->Finish(ToGrpcStatus(grants.status()));
                       for (const Grant& grant : *grants) {
                         Describe(grant, *reply->add_container_responses());
                       }
                       call->Finish(grpc::Status::OK);
                     });
  return call;
}

}  // namespace clusterkv::service
