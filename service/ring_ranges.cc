#include "service/ring_ranges.h"

#include <iterator>

namespace clusterkv::service {

bool RingRanges::Acquire(uint32_t arena, uint64_t offset, uint64_t bytes) {
  const auto next = ranges_.lower_bound({arena, offset});
  if (next != ranges_.end() && next->first.first == arena && next->first.second < offset + bytes) {
    return false;
  }
  if (next != ranges_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first.first == arena && previous->first.second + previous->second > offset) {
      return false;
    }
  }
  ranges_.emplace_hint(next, std::pair(arena, offset), bytes);
  bytes_ += bytes;
  return true;
}

void RingRanges::Release(uint32_t arena, uint64_t offset) {
  const auto found = ranges_.find({arena, offset});
  if (found == ranges_.end()) return;
  bytes_ -= found->second;
  ranges_.erase(found);
}

}  // namespace clusterkv::service
