// Parts of GetStatus as JSON, with the names that /status uses.
#pragma once

#include <nlohmann/json.hpp>

#include "clusterkv/v1/status.pb.h"

namespace clusterkv::client::ctl {

nlohmann::ordered_json SessionInfoJson(const v1::SessionInfo& session);
nlohmann::ordered_json HostBytesJson(const v1::HostBytes& host);
nlohmann::ordered_json GrantListJson(const v1::GetStatusReply& status);
nlohmann::ordered_json CountersJson(const v1::GetStatusReply& status);
nlohmann::ordered_json RecentErrorsJson(const v1::GetStatusReply& status);

}  // namespace clusterkv::client::ctl
