// Grants: what of the host pool is promised to whom, and who comes by whose sockets.
#include <utility>
#include <vector>

#include "service/core.h"
#include "service/logging.h"

namespace clusterkv::service {

void ServiceCore::OpenGrant(GrantId grant, uint64_t bytes, std::vector<GrantId> former,
                            Completion<bool> done) {
  Call<bool>(std::move(done),
             [this, grant, bytes, former = std::move(former)](const Completion<bool>& reply) {
               if (draining_) return reply(absl::UnavailableError("the daemon is draining"));
               if (absl::Status bad = accounts_.Open(grant, bytes, former); !bad.ok())
                 return reply(bad);
               PublishStatus();
               reply(true);
             });
}

void ServiceCore::RevokeGrant(GrantId grant, absl::Status why, Completion<bool> done) {
  Call<bool>(std::move(done), [this, grant, why = std::move(why)](const Completion<bool>& reply) {
    const bool known = accounts_.Find(grant) != nullptr;
    accounts_.Close(grant);
    std::vector<Session*> open;  // ending one may erase it
    for (auto& [id, session] : sessions_) {
      if (!session->over && session->hello.grant == grant) open.push_back(session.get());
    }
    for (Session* session : open) End(*session, SessionEnd::kGrantRevoked, why);
    PublishStatus();
    reply(known);
  });
}

}  // namespace clusterkv::service
