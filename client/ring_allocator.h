// Who uses which part of a ring: the ingest ring, or the audit ring. A range never wraps; ranges
// come back in any order, so free parts are kept as a list and taken first-fit:
//
//   | in use | free   | in use | in use | free             |
//            ^ a later range goes here if it fits, whatever still lies before it
//
// A decoded sequence keeps a range for many steps; a first-in-first-out ring would stop at it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/deadline.h"

namespace clusterkv::client {

// Thread-safe. Sizes and offsets in bytes; every range starts on kAlignment.
class RingAllocator {
 public:
  static constexpr uint64_t kAlignment = 64;  // of IngestTokens.ring_offset

  explicit RingAllocator(uint64_t bytes);

  // The offset of a free range; waits for one. Errors: INVALID_ARGUMENT (0, or above the ring),
  // RESOURCE_EXHAUSTED (none in time), why the ring was closed.
  absl::StatusOr<uint64_t> Allocate(uint64_t bytes, const Deadline& deadline);
  // Keeps the first `bytes` of a range that is in use.
  void Shrink(uint64_t offset, uint64_t bytes);
  // Gives a range back: a credit, or one that was never handed over. False if none starts there.
  bool Release(uint64_t offset);
  // Ends all waits, now and later. The first reason stays.
  void Close(const absl::Status& why);

  uint64_t bytes() const { return bytes_; }
  uint64_t free_bytes() const;

 private:
  // REQUIRES: mutex_ held.
  void AddFree(uint64_t offset, uint64_t bytes);
  bool Take(uint64_t bytes, uint64_t* offset);

  const uint64_t bytes_;
  mutable std::mutex mutex_;
  std::condition_variable freed_;
  // Guarded by mutex_; offset -> bytes, whole multiples of kAlignment.
  std::map<uint64_t, uint64_t> free_;
  std::map<uint64_t, uint64_t> used_;
  absl::Status closed_;
};

}  // namespace clusterkv::client
