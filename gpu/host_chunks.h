// The table of mapped host chunks that a BatchSlot points to: one thread maps, others read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clusterkv::gpu {

// Where a host chunk is mapped in this process; null if it is not. Acquires what the thread that
// mapped it released.
inline const std::byte* LoadHostChunk(const std::byte* const* host_chunks, uint32_t chunk) {
  return __atomic_load_n(host_chunks + chunk, __ATOMIC_ACQUIRE);
}

}  // namespace clusterkv::gpu
