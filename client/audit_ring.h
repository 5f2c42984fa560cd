// Where sampled steps lie on their way to the daemon: an arena of the session, written by the
// steps' streams and read by the daemon.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "client/arena.h"
#include "client/ring_allocator.h"
#include "clusterkv/v1/sequence.pb.h"

namespace clusterkv::client {

// Thread-safe.
class AuditRing {
 public:
  // A part of the ring, free again when this is destroyed. Move-only.
  class Slot {
   public:
    Slot(Slot&&) = default;
    Slot& operator=(Slot&&) = delete;
    ~Slot();

    std::byte* data() const { return ring_->arena_.memory->data() + offset_; }
    v1::ArenaRange range() const;
    // Somebody may go on reading it: it is never free again.
    void Abandon() { ring_ = nullptr; }

   private:
    friend class AuditRing;
    Slot(std::shared_ptr<AuditRing> ring, uint64_t offset, uint64_t bytes)
        : ring_(std::move(ring)), offset_(offset), bytes_(bytes) {}

    std::shared_ptr<AuditRing> ring_;  // null: moved from or abandoned
    uint64_t offset_;
    uint64_t bytes_;
  };

  // Room for kSlots slots, but of very large ones fewer.
  static uint64_t BytesFor(uint64_t slot_bytes);

  explicit AuditRing(Arena arena);

  uint64_t bytes() const { return ranges_.bytes(); }
  // Nothing if there is no room: never waits.
  static std::optional<Slot> Take(const std::shared_ptr<AuditRing>& ring, uint64_t bytes);

 private:
  static constexpr uint64_t kSlots = 32;
  static constexpr uint64_t kManyBytes = 8 << 20;

  const Arena arena_;
  RingAllocator ranges_;
};

}  // namespace clusterkv::client
