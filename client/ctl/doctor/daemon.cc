#include "client/ctl/doctor/daemon.h"

#include <fmt/format.h>

namespace clusterkv::client::ctl {

Check CheckDaemon(const absl::StatusOr<v1::GetStatusReply>& status, const std::string& version) {
  Check check{.name = "daemon", .verdict = Verdict::kFail, .found = {}, .advice = {}};
  if (!status.ok()) {
    check.found = std::string(status.status().message());
    check.advice =
        "is it running (systemctl status clusterkvd, kubectl get pods)? its log says why";
    return check;
  }
  check.found = fmt::format("version {}, backend {}, {}", status->version(), status->backend(),
                            status->ready() ? "ready" : "not ready: " + status->not_ready_reason());
  if (!status->ready()) {
    check.advice = "see its log, and dmesg for the device";
  } else if (status->version() != version) {
    check.verdict = Verdict::kWarn;
    check.found += fmt::format("; this program is {}", version);
    check.advice = "install the same version of both";
  } else {
    check.verdict = Verdict::kOk;
  }
  return check;
}

}  // namespace clusterkv::client::ctl
