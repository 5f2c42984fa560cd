// Places extents in the host chunks of one session, first fit.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

namespace clusterkv::service {

// Bytes [offset, offset + bytes) of a chunk. Plain value; whoever holds it frees it.
struct Extent {
  uint32_t chunk = 0;  // index within the session
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

// Not thread-safe. Sizes and offsets are multiples of kAlignment.
class ExtentAllocator {
 public:
  static constexpr uint64_t kAlignment = 256;

  static uint64_t RoundUp(uint64_t bytes) { return (bytes + kAlignment - 1) & ~(kAlignment - 1); }

  void AddChunk(uint32_t chunk, uint64_t bytes);
  // REQUIRES: chunk_empty(chunk).
  void RemoveChunk(uint32_t chunk);

  // nullopt if no chunk has a hole that large.
  std::optional<Extent> Allocate(uint64_t bytes);
  void Free(const Extent& extent);
  // Gives back all beyond the first `bytes` (rounded up).
  void Shrink(Extent& extent, uint64_t bytes);

  bool chunk_empty(uint32_t chunk) const;
  uint64_t used_bytes() const;    // of all chunks
  uint64_t largest_hole() const;  // looks at every hole

 private:
  struct Chunk {
    uint64_t bytes = 0;
    uint64_t free_bytes = 0;
    std::map<uint64_t, uint64_t> holes;  // offset -> bytes, never adjacent
  };

  void AddHole(Chunk& chunk, uint64_t offset, uint64_t bytes);

  std::map<uint32_t, Chunk> chunks_;
};

}  // namespace clusterkv::service
