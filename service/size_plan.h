// How much memory a load needs: the arithmetic of admission, asked beforehand (deploy/SIZING.md).
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "gpu/method_options.h"
#include "gpu/shape.h"

namespace clusterkv::service {

struct SizeQuestion {
  gpu::Shape shape;
  gpu::MethodOptions method;
  uint32_t max_tokens = 0;
  uint32_t sequences = 1;  // at the same time, spread evenly over the workers
  uint32_t workers = 1;
  uint64_t ring_bytes = 64ull << 20;  // of each worker; the client library's default
  uint64_t host_chunk_bytes = 0;      // 0: as the daemon would choose it
};

// Bytes.
struct SizePlan {
  // Of one sequence.
  uint64_t full_kv = 0;  // K and V of every token: what it takes without clusterkv, on the GPU
  uint64_t state = 0;    // on the GPU; the sum of what follows
  uint64_t cache = 0;
  uint64_t clusters = 0;  // centroids, value means, where they lie, when they were used
  uint64_t window = 0;    // and sinks
  uint64_t rows = 0;      // the cache slot of each row
  uint64_t rest = 0;
  uint64_t host = 0;  // reserved in the host pool

  // Of all: what the daemon must be given.
  uint64_t gpu_memory = 0;
  uint64_t host_memory = 0;
  uint64_t host_chunk = 0;
  // As a container (--device-plugin): how many clusterkv.io/host-gib the worker with most sequences
  // asks for.
  uint64_t worker_gib = 0;
};

// Errors: INVALID_ARGUMENT that says what is allowed, also if a segment does not fit
// host_chunk_bytes.
absl::StatusOr<SizePlan> PlanSize(const SizeQuestion& question);

}  // namespace clusterkv::service
