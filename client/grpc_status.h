// The one place where gRPC's status becomes ours. Codes are the same numbers on both sides.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace grpc {
class Status;
}

namespace clusterkv::client {

// `what` is put before the message: the call, and whom it asked.
absl::Status FromGrpc(const grpc::Status& status, const std::string& what);

// A code as messages carry it; what is no canonical code becomes UNKNOWN.
absl::Status FromCode(int code, const std::string& message);

// A call that failed so may have been carried out, or be so yet: only its answer is missing.
bool MayHaveHappened(const absl::Status& status);

// The same code, with `what` before the message. OK stays OK.
absl::Status Annotate(const absl::Status& status, const std::string& what);

}  // namespace clusterkv::client
