// The DevicePlugin service that the kubelet calls: translates, nothing else. Reactions never block.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "kubelet/deviceplugin/v1beta1/api.grpc.pb.h"
#include "service/core_types.h"
#include "service/device_plugin/grants.h"

namespace clusterkv::service {

constexpr char kDevicePluginVersion[] = "v1beta1";
constexpr char kResourceName[] = "clusterkv.io/host-gib";
// Where a container finds its grant's folder.
constexpr char kContainerFolder[] = "/run/clusterkv";
constexpr char kAddressVariable[] = "CLUSTERKV_ADDRESS";
constexpr char kGrantAnnotation[] = "clusterkv.io/grant";  // for `crictl inspect`

// What answers the calls. Thread-safe; does not block.
class PluginRequests {
 public:
  virtual ~PluginRequests() = default;
  virtual void Allocate(std::vector<DeviceIds> containers, Completion<std::vector<Grant>> done) = 0;
  virtual void Prefer(std::vector<Preference> containers,
                      Completion<std::vector<DeviceIds>> done) = 0;
};

v1beta1::DevicePluginOptions PluginOptions();

// Thread-safe.
class PluginService : public v1beta1::DevicePlugin::CallbackService {
 public:
  // Devices are unhealthy at first. The requests must outlive it.
  PluginService(const DeviceIds& devices, PluginRequests& requests);

  // Tells everyone who watches, if it has changed.
  void SetHealthy(bool healthy);
  // Streams of the kubelet that stand.
  size_t watchers() const;
  // Ends them, so that their server can shut down.
  void EndWatches();

  grpc::ServerUnaryReactor* GetDevicePluginOptions(grpc::CallbackServerContext* context,
                                                   const v1beta1::Empty* request,
                                                   v1beta1::DevicePluginOptions* reply) override;
  grpc::ServerWriteReactor<v1beta1::ListAndWatchResponse>* ListAndWatch(
      grpc::CallbackServerContext* context, const v1beta1::Empty* request) override;
  grpc::ServerUnaryReactor* GetPreferredAllocation(
      grpc::CallbackServerContext* context, const v1beta1::PreferredAllocationRequest* request,
      v1beta1::PreferredAllocationResponse* reply) override;
  grpc::ServerUnaryReactor* Allocate(grpc::CallbackServerContext* context,
                                     const v1beta1::AllocateRequest* request,
                                     v1beta1::AllocateResponse* reply) override;

 private:
  class Watch;
  using List = std::shared_ptr<const v1beta1::ListAndWatchResponse>;

  List MakeList(bool healthy) const;

  const DeviceIds devices_;
  PluginRequests& requests_;
  mutable std::mutex mu_;
  bool healthy_ = false;      // guarded by mu_
  List list_;                 // guarded by mu_
  std::set<Watch*> watches_;  // guarded by mu_
};

}  // namespace clusterkv::service
