// `clusterkvctl top`: a daemon's status, again and again.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/connection.h"

namespace clusterkv::client::ctl {

struct TopOptions {
  absl::Duration interval = absl::Seconds(2);
  absl::Duration timeout = absl::Seconds(5);  // of a call
  uint32_t iterations = 0;                    // 0: until someone wants to leave
  bool json = false;
};

// On a terminal it draws the whole screen; elsewhere a tick follows the other, with an empty line
// between. JSON is one object a line. A daemon that stops answering is waited for and shown as
// such. Errors: the first call's, or the last one's.
absl::Status RunTop(Connection& connection, const TopOptions& options);

}  // namespace clusterkv::client::ctl
