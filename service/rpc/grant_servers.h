// The sockets of grants, over gRPC servers of their own and the attach server: gRPC does not tell
// by which socket a call came. A server costs no thread: callback calls of all run on gRPC's own.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "service/attach_server.h"
#include "service/device_plugin/grant_sockets.h"
#include "service/rpc/grpc_server.h"

namespace clusterkv::service {

// Names in a grant's folder, and so in the container's.
constexpr char kGrantSocketName[] = "clusterkvd.sock";
constexpr char kGrantAttachName[] = "clusterkvd.sock.attach";

// Not thread-safe. What it is made of must outlive it, or CloseAll come before.
class GrantServers : public GrantSockets {
 public:
  GrantServers(ServiceCore& core, AttachServer& attach, RpcCounters& calls)
      : core_(core), attach_(attach), calls_(calls) {}
  ~GrantServers() override { CloseAll(absl::ZeroDuration()); }

  absl::Status Open(GrantId grant, const std::string& folder) override;
  void Close(GrantId grant) override;
  void SetServing(bool serving) override;
  void CloseAll(absl::Duration timeout) override;

 private:
  ServiceCore& core_;
  AttachServer& attach_;
  RpcCounters& calls_;
  bool serving_ = true;
  std::map<GrantId, std::unique_ptr<GrpcServer>> servers_;
};

}  // namespace clusterkv::service
