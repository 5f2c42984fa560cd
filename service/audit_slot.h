// Reads a slot of a worker's audit ring (gpu/audit_layout.h): from there and the entries of the
// clusters in the sequence's state to what an audit compares. A worker can write both, so each is
// copied once, and the copy is checked before it is a size or an index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "gpu/device.h"
#include "gpu/state_layout.h"
#include "service/recall_audit.h"

namespace clusterkv::service {

struct AuditSource {
  const gpu::StateLayout* layout = nullptr;  // the daemon's own
  const std::byte* state = nullptr;          // device memory, as the slot
  const std::byte* slot = nullptr;
  uint32_t layer = 0;
  std::vector<uint32_t> published_clusters;  // [kv_heads], of this layer
};

// Completes `step`, whose runs and candidates are those of all published segments: ends them at the
// slot's cut, and fills in queries, log-sum-exps and what was chosen. Waits for the stream.
// Errors: INVALID_ARGUMENT (cut, clusters, takes: which, and what is allowed), those of the stream.
absl::Status ReadAuditSlot(gpu::Stream& stream, const AuditSource& source, AuditStep& step);

}  // namespace clusterkv::service
