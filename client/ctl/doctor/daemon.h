// Does the daemon answer, and is it of this version?
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "client/ctl/doctor/check.h"
#include "clusterkv/v1/status.pb.h"

namespace clusterkv::client::ctl {

// `version`: of this program.
Check CheckDaemon(const absl::StatusOr<v1::GetStatusReply>& status, const std::string& version);

}  // namespace clusterkv::client::ctl
