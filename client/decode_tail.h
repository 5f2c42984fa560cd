// The decoded tokens of one direct sequence that the daemon does not have yet. They gather in one
// range of the ingest ring, laid out for all the tokens that it has room for; a range that is
// handed over before it is full is first moved together, within itself:
//
//   [layer 0 K: t0 t1 . .][layer 0 V: t0 t1 . .][layer 1 K: t0 t1 . .] ...
//   [layer 0 K: t0 t1][layer 0 V: t0 t1][layer 1 K: t0 t1] ...
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/kv_packer.h"
#include "client/ring_allocator.h"
#include "client/ring_layout.h"
#include "gpu/decode_ops.h"
#include "gpu/shape.h"

namespace clusterkv::client {

// Not thread-safe. Gives its range back when destroyed.
class DecodeTail {
 public:
  struct Range {
    uint64_t offset = 0;  // in the ring
    uint32_t position = 0;
    uint32_t count = 0;
  };

  // `ring` must outlive it.
  DecodeTail(const gpu::Shape& shape, RingAllocator& ring) : shape_(shape), ring_(ring) {}
  ~DecodeTail() { Drop(); }
  DecodeTail(const DecodeTail&) = delete;
  DecodeTail& operator=(const DecodeTail&) = delete;

  // Makes room for the token at `position`; a new range is for `capacity` tokens, or half of that
  // and so on down to 1. Does not wait. Errors: RESOURCE_EXHAUSTED, and nothing changes.
  absl::Status Reserve(uint32_t position, uint32_t capacity);
  // Where that token goes: K of layer 0, [kv_heads][head_dim], in the ring that starts at
  // `ring_data`; its V `stride()` bytes on, then the next layer's K, and so forth
  // (gpu::BatchSlot::tail).
  std::byte* token(std::byte* ring_data) const;
  uint64_t stride() const { return RangeLayout(shape_, shape_.layers, capacity_).block_bytes(); }
  // All layers of it lie there.
  void Commit() { ++count_; }

  bool empty() const { return count_ == 0; }
  bool full() const { return range_.has_value() && count_ == capacity_; }
  // Moves the committed tokens together. REQUIRES: not empty. The stream must have passed before
  // Take.
  absl::Status Compact(KvPacker& packer, std::byte* ring_data) const;
  // Gives the committed tokens away. REQUIRES: full, or Compact has succeeded since the last
  // Commit.
  Range Take();
  void Drop();

 private:
  const gpu::Shape shape_;
  RingAllocator& ring_;
  std::optional<uint64_t> range_;  // its offset
  uint32_t position_ = 0;          // of its first token
  uint32_t capacity_ = 0;
  uint32_t count_ = 0;  // committed
};

}  // namespace clusterkv::client
