// Tells systemd how far the daemon is: the sd_notify protocol, one datagram to the socket that
// $NOTIFY_SOCKET names. Where there is none nothing is told.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace clusterkv::service {

// READY=1, STOPPING=1 and the like. `socket` is the variable's value; null or empty: nobody asked.
// Errors: INVALID_ARGUMENT (no path, or too long), what errno says.
absl::Status NotifyServiceManager(const char* socket, const std::string& state);

}  // namespace clusterkv::service
