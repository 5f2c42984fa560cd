#include "client/grpc_status.h"

#include <grpcpp/support/status.h>

#include "absl/strings/str_cat.h"

namespace clusterkv::client {

absl::Status FromGrpc(const grpc::Status& status, const std::string& what) {
  if (status.ok()) return absl::OkStatus();
  return FromCode(static_cast<int>(status.error_code()),
                  absl::StrCat(what, ": ", status.error_message()));
}

absl::Status FromCode(int code, const std::string& message) {
  if (code == 0) return absl::OkStatus();
  if (code < 0 || code > static_cast<int>(absl::StatusCode::kUnauthenticated)) {
    return absl::UnknownError(absl::StrCat(message, " (code ", code, ")"));
  }
  return absl::Status(static_cast<absl::StatusCode>(code), message);
}

bool MayHaveHappened(const absl::Status& status) {
  return absl::IsDeadlineExceeded(status) || absl::IsUnavailable(status);
}

absl::Status Annotate(const absl::Status& status, const std::string& what) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(what, ": ", status.message()));
}

}  // namespace clusterkv::client
