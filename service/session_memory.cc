#include "service/session_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

// Indices that the client's table of mapped chunks holds.
constexpr uint32_t kMaxChunksOfSession = 65536;

}  // namespace

uint32_t SessionMemory::ReservedChunks(double needed) const {
  const auto whole = static_cast<uint64_t>(std::ceil(std::max(0.0, needed - 1e-6)));
  return static_cast<uint32_t>(whole > lent_ ? whole - lent_ : 0);
}

absl::Status SessionMemory::AddReservation(double chunks) {
  if (needed_chunks_ + chunks > pool_.chunk_count()) {
    return absl::ResourceExhaustedError(
        fmt::format("host pool: {:.1f} chunks of {} bytes needed, it has {}",
                    needed_chunks_ + chunks, pool_.chunk_bytes(), pool_.chunk_count()));
  }
  const uint32_t reserved = ReservedChunks(needed_chunks_ + chunks);
  if (reserved > reserved_chunks_) {
    CKV_RETURN_IF_ERROR(account_.Reserve(reserved - reserved_chunks_));
    reserved_chunks_ = reserved;
  }
  needed_chunks_ += chunks;
  return absl::OkStatus();
}

void SessionMemory::RemoveReservation(double chunks) {
  needed_chunks_ = std::max(0.0, needed_chunks_ - chunks);
  const uint32_t reserved = ReservedChunks(needed_chunks_);
  if (reserved < reserved_chunks_) {
    account_.Unreserve(reserved_chunks_ - reserved);
    reserved_chunks_ = reserved;
  }
  for (const auto& [index, chunk] : chunks_) {
    if (Needed()) break;
    if (!chunk.quarantined && allocator_.chunk_empty(index)) Revoke(index);
  }
}

absl::StatusOr<Extent> SessionMemory::Allocate(uint64_t bytes) {
  if (auto extent = allocator_.Allocate(bytes)) return *extent;
  if (bytes > pool_.chunk_bytes() || ExtentAllocator::RoundUp(bytes) > pool_.chunk_bytes()) {
    return absl::ResourceExhaustedError(fmt::format(
        "host-chunk: {} bytes do not fit a chunk of {} bytes", bytes, pool_.chunk_bytes()));
  }
  if (given_up_.empty() && next_chunk_ == kMaxChunksOfSession) {
    return absl::ResourceExhaustedError(
        fmt::format("the session holds {} chunks, the most there can be", chunks_.size()));
  }
  const bool from_reserve = reserved_chunks_ > 0;
  CKV_ASSIGN_OR_RETURN(
      const PoolChunk pool_chunk,
      account_.Lend(from_reserve ? HostPool::Source::kReserved : HostPool::Source::kFree));
  if (from_reserve) --reserved_chunks_;
  const uint32_t chunk = given_up_.empty() ? next_chunk_++ : *given_up_.begin();
  given_up_.erase(chunk);
  chunks_[chunk] = Chunk{.pool_chunk = pool_chunk};
  ++lent_;
  allocator_.AddChunk(chunk, pool_.chunk_bytes());
  events_.OnChunkLent(chunk, pool_chunk);
  return *allocator_.Allocate(bytes);
}

void SessionMemory::Free(const Extent& extent) {
  allocator_.Free(extent);
  if (!Needed() && allocator_.chunk_empty(extent.chunk)) Revoke(extent.chunk);
}

std::byte* SessionMemory::data(const Extent& extent) const {
  return chunk_data(extent.chunk) + extent.offset;
}

bool SessionMemory::Needed() const {
  return std::ceil(needed_chunks_ - 1e-6) >= static_cast<double>(lent_);
}

void SessionMemory::Revoke(uint32_t chunk) {
  Chunk& revoked = chunks_.at(chunk);
  allocator_.RemoveChunk(chunk);
  revoked.quarantined = true;
  --lent_;
  account_.Quarantine(revoked.pool_chunk);
  events_.OnChunkRevoked(chunk);
}

absl::Status SessionMemory::ConfirmMapped(uint32_t chunk) {
  const auto found = chunks_.find(chunk);
  if (found == chunks_.end()) {
    return absl::InvalidArgumentError(fmt::format("chunk {} was not granted", chunk));
  }
  if (found->second.mapped) {
    return absl::InvalidArgumentError(fmt::format("chunk {} is mapped already", chunk));
  }
  found->second.mapped = true;
  return absl::OkStatus();
}

absl::Status SessionMemory::ConfirmUnmapped(uint32_t chunk) {
  const auto found = chunks_.find(chunk);
  if (found == chunks_.end() || !found->second.quarantined) {
    return absl::InvalidArgumentError(fmt::format("chunk {} was not revoked", chunk));
  }
  const PoolChunk pool_chunk = found->second.pool_chunk;
  chunks_.erase(found);
  given_up_.insert(chunk);
  events_.OnChunkReturned(pool_chunk);
  return absl::OkStatus();
}

bool SessionMemory::mapped(uint32_t chunk) const {
  const auto found = chunks_.find(chunk);
  return found != chunks_.end() && found->second.mapped;
}

void SessionMemory::QuarantineAll() {
  account_.Unreserve(reserved_chunks_);
  reserved_chunks_ = 0;
  needed_chunks_ = 0;
  for (auto& [index, chunk] : chunks_) {
    if (chunk.quarantined) continue;
    allocator_.RemoveChunk(index);
    chunk.quarantined = true;
    --lent_;
    account_.Quarantine(chunk.pool_chunk);
  }
}

void SessionMemory::ReleaseAll() {
  for (const auto& [index, chunk] : chunks_) events_.OnChunkReturned(chunk.pool_chunk);
  chunks_.clear();
}

}  // namespace clusterkv::service
