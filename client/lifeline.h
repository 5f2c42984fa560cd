// A file whose write record lock shows that this process lives (design D10): the kernel drops the
// lock when the process dies, and fork does not inherit it. For daemons on kernels without
// SO_PEERPIDFD.
#pragma once

#include "absl/status/statusor.h"
#include "gpu/unique_fd.h"

namespace clusterkv::client {

// Locked for as long as this process keeps every descriptor of it open.
absl::StatusOr<gpu::UniqueFd> CreateLifeline();

}  // namespace clusterkv::client
