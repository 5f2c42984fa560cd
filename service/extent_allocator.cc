#include "service/extent_allocator.h"

#include <algorithm>
#include <iterator>

namespace clusterkv::service {

void ExtentAllocator::AddChunk(uint32_t chunk, uint64_t bytes) {
  Chunk& added = chunks_[chunk];
  added.bytes = bytes;
  added.free_bytes = bytes;
  added.holes[0] = bytes;
}

void ExtentAllocator::RemoveChunk(uint32_t chunk) { chunks_.erase(chunk); }

std::optional<Extent> ExtentAllocator::Allocate(uint64_t bytes) {
  const uint64_t size = RoundUp(bytes);
  for (auto& [index, chunk] : chunks_) {
    if (chunk.free_bytes < size) continue;
    for (auto hole = chunk.holes.begin(); hole != chunk.holes.end(); ++hole) {
      if (hole->second < size) continue;
      const Extent extent{index, hole->first, size};
      const uint64_t rest = hole->second - size;
      chunk.holes.erase(hole);
      if (rest > 0) chunk.holes[extent.offset + size] = rest;
      chunk.free_bytes -= size;
      return extent;
    }
  }
  return std::nullopt;
}

void ExtentAllocator::Free(const Extent& extent) {
  AddHole(chunks_.at(extent.chunk), extent.offset, extent.bytes);
}

void ExtentAllocator::Shrink(Extent& extent, uint64_t bytes) {
  const uint64_t size = RoundUp(bytes);
  if (size >= extent.bytes) return;
  AddHole(chunks_.at(extent.chunk), extent.offset + size, extent.bytes - size);
  extent.bytes = size;
}

bool ExtentAllocator::chunk_empty(uint32_t chunk) const {
  const Chunk& found = chunks_.at(chunk);
  return found.free_bytes == found.bytes;
}

uint64_t ExtentAllocator::used_bytes() const {
  uint64_t used = 0;
  for (const auto& [index, chunk] : chunks_) used += chunk.bytes - chunk.free_bytes;
  return used;
}

uint64_t ExtentAllocator::largest_hole() const {
  uint64_t largest = 0;
  for (const auto& [index, chunk] : chunks_) {
    for (const auto& [offset, bytes] : chunk.holes) largest = std::max(largest, bytes);
  }
  return largest;
}

void ExtentAllocator::AddHole(Chunk& chunk, uint64_t offset, uint64_t bytes) {
  chunk.free_bytes += bytes;
  auto next = chunk.holes.lower_bound(offset);
  if (next != chunk.holes.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      bytes += previous->second;
      chunk.holes.erase(previous);
    }
  }
  if (next != chunk.holes.end() && offset + bytes == next->first) {
    bytes += next->second;
    chunk.holes.erase(next);
  }
  chunk.holes[offset] = bytes;
}

}  // namespace clusterkv::service
