// Where the daemon is, if the caller does not say, and where its attach socket is.
#pragma once

#include <string>

namespace clusterkv::client {

// $CLUSTERKV_ADDRESS, which the device plugin sets in a worker's container; without it, or if it is
// empty, the daemon's own default.
std::string DefaultAddress();

// What Welcome calls the attach socket: a relative path begins at the folder of the gRPC socket.
std::string ResolveAttachPath(const std::string& address, const std::string& attach_path);

}  // namespace clusterkv::client
