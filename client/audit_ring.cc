#include "client/audit_ring.h"

#include <algorithm>
#include <bit>

namespace clusterkv::client {

AuditRing::Slot::~Slot() {
  if (ring_ != nullptr) ring_->ranges_.Release(offset_);
}

v1::ArenaRange AuditRing::Slot::range() const {
  v1::ArenaRange range;
  range.set_arena_id(ring_->arena_.id);
  range.set_offset(offset_);
  range.set_bytes(bytes_);
  return range;
}

uint64_t AuditRing::BytesFor(uint64_t slot_bytes) {
  // A power of two, so that a ring that has to grow does so a few times only.
  return std::bit_ceil(std::max(slot_bytes, std::min(kSlots * slot_bytes, kManyBytes)));
}

AuditRing::AuditRing(Arena arena) : arena_(std::move(arena)), ranges_(arena_.memory->bytes()) {}

std::optional<AuditRing::Slot> AuditRing::Take(const std::shared_ptr<AuditRing>& ring,
                                               uint64_t bytes) {
  const auto offset = ring->ranges_.Allocate(bytes, Deadline(absl::ZeroDuration()));
  if (!offset.ok()) return std::nullopt;
  return Slot(ring, *offset, bytes);
}

}  // namespace clusterkv::client
