// The id that ties a call's lines in the client's and the daemon's logs together: metadata
// x-request-id, of the caller's choice, or made here.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace grpc {
class ServerContextBase;
}

namespace clusterkv::service {

inline constexpr char kRequestIdKey[] = "x-request-id";

// Errors: INVALID_ARGUMENT, for one that is there twice, is no id, or is too long.
absl::StatusOr<std::string> RequestId(const grpc::ServerContextBase& context);

// 1 to 64 letters, digits and `. _ : -`.
absl::Status CheckRequestId(const std::string& id);

// Logs a call that failed. What the daemon got wrong is an error; what it had no room for, and a
// caller that nobody knows, a warning; what callers get wrong is information. Bounded in number.
void LogFailedCall(const char* method, const std::string& request_id, const absl::Status& why);

}  // namespace clusterkv::service
