// The host memory of one session: the chunks it was lent, and the extents in them.
//
// Chunks are numbered within the session; a number is used again once the worker has given it up.
// A chunk is granted to the worker when it is lent (if the worker maps host memory at all), counts
// as mapped once the worker says so, and is revoked when no extent is left in it and no reservation
// needs it.
#pragma once

#include <cstdint>
#include <map>
#include <set>

#include "absl/status/statusor.h"
#include "service/extent_allocator.h"
#include "service/host_account.h"

namespace clusterkv::service {

// What the session memory tells the worker, and the pool's janitor.
class ChunkEvents {
 public:
  virtual ~ChunkEvents() = default;
  virtual void OnChunkLent(uint32_t chunk, PoolChunk pool_chunk) = 0;
  virtual void OnChunkRevoked(uint32_t chunk) = 0;
  // Quarantined, and proven to be mapped by nobody.
  virtual void OnChunkReturned(PoolChunk pool_chunk) = 0;
};

// Not thread-safe.
class SessionMemory {
 public:
  SessionMemory(HostAccount& account, ChunkEvents& events)
      : account_(account), pool_(account.pool()), events_(events) {}

  // Changes what the session's sequences need, in chunks (fractions add up: several small
  // sequences share one chunk). Errors: RESOURCE_EXHAUSTED, and nothing changes.
  absl::Status AddReservation(double chunks);
  void RemoveReservation(double chunks);

  // Errors: RESOURCE_EXHAUSTED.
  absl::StatusOr<Extent> Allocate(uint64_t bytes);
  void Free(const Extent& extent);
  void Shrink(Extent& extent, uint64_t bytes) { allocator_.Shrink(extent, bytes); }

  std::byte* data(const Extent& extent) const;
  std::byte* chunk_data(uint32_t chunk) const { return pool_.data(chunks_.at(chunk).pool_chunk); }

  // The worker's word, once for each chunk, so that it cannot flood us. Errors: INVALID_ARGUMENT
  // for a chunk that it was not granted, has mapped already, or has not been asked to give up.
  absl::Status ConfirmMapped(uint32_t chunk);
  absl::Status ConfirmUnmapped(uint32_t chunk);
  bool mapped(uint32_t chunk) const;

  // The session is over: no extent is in use. Chunks the worker may still have mapped stay in
  // quarantine until ReleaseAll.
  void QuarantineAll();
  // The worker is proven to map nothing: it said so, or it is dead.
  void ReleaseAll();

  uint64_t lent_bytes() const { return lent_ * pool_.chunk_bytes(); }
  uint64_t extent_bytes() const { return allocator_.used_bytes(); }
  uint64_t largest_hole() const { return allocator_.largest_hole(); }
  bool holds_nothing() const { return chunks_.empty(); }

 private:
  struct Chunk {
    PoolChunk pool_chunk = 0;
    bool mapped = false;
    bool quarantined = false;  // revoked, or the session is over
  };

  uint32_t ReservedChunks(double needed) const;
  bool Needed() const;  // all that is lent
  void Revoke(uint32_t chunk);

  HostAccount& account_;
  HostPool& pool_;
  ChunkEvents& events_;
  ExtentAllocator allocator_;
  std::map<uint32_t, Chunk> chunks_;
  std::set<uint32_t> given_up_;  // numbers to use again
  uint32_t next_chunk_ = 0;      // never used yet
  uint32_t lent_ = 0;
  double needed_chunks_ = 0;
  uint32_t reserved_chunks_ = 0;  // max(0, ceil(needed) - lent), held in the pool
};

}  // namespace clusterkv::service
