#include "service/rpc/grant_servers.h"

#include <algorithm>
#include <utility>

#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

// For calls of a revoked grant, whose sessions have ended before.
constexpr absl::Duration kCloseTimeout = absl::Seconds(1);

}  // namespace

absl::Status GrantServers::Open(GrantId grant, const std::string& folder) {
  // First, since a worker that has a session goes there at once.
  CKV_RETURN_IF_ERROR(attach_.Listen(grant, folder + "/" + kGrantAttachName));
  // The container sees the folder elsewhere: the attach socket is told beside the gRPC socket.
  auto server = GrpcServer::Create({.listen = "unix:" + folder + "/" + kGrantSocketName,
                                    .attach_path = kGrantAttachName,
                                    .grant = grant},
                                   core_, calls_);
  if (!server.ok()) {
    attach_.StopListening(grant);
    return server.status();
  }
  (*server)->SetServing(serving_);
  servers_[grant] = *std::move(server);
  return absl::OkStatus();
}

void GrantServers::Close(GrantId grant) {
  const auto found = servers_.find(grant);
  if (found == servers_.end()) return;
  attach_.StopListening(grant);
  found->second->Shutdown(kCloseTimeout);
  servers_.erase(found);
}

void GrantServers::SetServing(bool serving) {
  if (std::exchange(serving_, serving) == serving) return;
  for (const auto& [grant, server] : servers_) server->SetServing(serving);
}

void GrantServers::CloseAll(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  for (const auto& [grant, server] : servers_) {
    server->Shutdown(std::max(deadline - absl::Now(), absl::ZeroDuration()));
    attach_.StopListening(grant);
  }
  servers_.clear();
}

}  // namespace clusterkv::service
