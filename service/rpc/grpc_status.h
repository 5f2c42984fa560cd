// absl::Status to grpc::Status: the one place of the daemon where they meet.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace clusterkv::service {

// Both use the canonical codes, so the number stays.
inline grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

}  // namespace clusterkv::service
