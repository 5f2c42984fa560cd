// The ranges of a session's arenas that are handed over and not given back yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

namespace clusterkv::service {

// Not thread-safe.
class RingRanges {
 public:
  // False, and nothing changes, if the range touches one that is in use.
  bool Acquire(uint32_t arena, uint64_t offset, uint64_t bytes);
  void Release(uint32_t arena, uint64_t offset);
  size_t size() const { return ranges_.size(); }
  uint64_t bytes() const { return bytes_; }

 private:
  std::map<std::pair<uint32_t, uint64_t>, uint64_t> ranges_;  // (arena, offset) -> bytes
  uint64_t bytes_ = 0;                                        // of all of them
};

}  // namespace clusterkv::service
