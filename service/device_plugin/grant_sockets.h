// Where the workers of a grant connect.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "service/grant_id.h"

namespace clusterkv::service {

class GrantSockets {
 public:
  virtual ~GrantSockets() = default;

  // Makes the gRPC and the attach socket in the folder, whatever lay there under their names; any
  // uid may connect. Errors: ALREADY_EXISTS, what errno says.
  virtual absl::Status Open(GrantId grant, const std::string& folder) = 0;
  // Ends what still runs on them, and removes them. Does nothing if they are not open.
  virtual void Close(GrantId grant) = 0;
  // What grpc.health.v1 says on all of them.
  virtual void SetServing(bool serving) = 0;
  // Closes all. Calls that run have the timeout, taken together, to come to their end.
  virtual void CloseAll(absl::Duration timeout) = 0;
};

}  // namespace clusterkv::service
