#include "client/ring_allocator.h"

#include <iterator>

#include "absl/strings/str_cat.h"

namespace clusterkv::client {
namespace {

uint64_t RoundUp(uint64_t bytes) {
  return (bytes + RingAllocator::kAlignment - 1) / RingAllocator::kAlignment *
         RingAllocator::kAlignment;
}

}  // namespace

RingAllocator::RingAllocator(uint64_t bytes) : bytes_(bytes / kAlignment * kAlignment) {
  if (bytes_ > 0) free_[0] = bytes_;
}

absl::StatusOr<uint64_t> RingAllocator::Allocate(uint64_t bytes, const Deadline& deadline) {
  if (bytes == 0 || bytes > bytes_) {
    return absl::InvalidArgumentError(absl::StrCat("a range of ", bytes, " bytes of a ring of ",
                                                   bytes_, "; allowed: 1 to the ring"));
  }
  const uint64_t rounded = RoundUp(bytes);
  uint64_t offset = 0;
  bool taken = false;
  std::unique_lock lock(mutex_);
  freed_.wait_until(lock, deadline.time(), [&] {
    taken = closed_.ok() && Take(rounded, &offset);
    return taken || !closed_.ok();
  });
  if (!closed_.ok()) return closed_;
  if (taken) return offset;
  return absl::ResourceExhaustedError(absl::StrCat("no ", bytes, " contiguous bytes of a ring of ",
                                                   bytes_, " came free in time (", used_.size(),
                                                   " ranges in use)"));
}

void RingAllocator::Shrink(uint64_t offset, uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto range = used_.find(offset);
  const uint64_t kept = RoundUp(bytes);
  if (range == used_.end() || kept == 0 || kept >= range->second) return;
  AddFree(offset + kept, range->second - kept);
  range->second = kept;
}

bool RingAllocator::Release(uint64_t offset) {
  const std::lock_guard lock(mutex_);
  const auto range = used_.find(offset);
  if (range == used_.end()) return false;
  AddFree(offset, range->second);
  used_.erase(range);
  return true;
}

void RingAllocator::Close(const absl::Status& why) {
  const std::lock_guard lock(mutex_);
  if (closed_.ok()) closed_ = why;
  freed_.notify_all();
}

uint64_t RingAllocator::free_bytes() const {
  const std::lock_guard lock(mutex_);
  uint64_t total = 0;
  for (const auto& [offset, bytes] : free_) total += bytes;
  return total;
}

void RingAllocator::AddFree(uint64_t offset, uint64_t bytes) {
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      freed_.notify_all();
      return;
    }
  }
  free_[offset] = bytes;
  freed_.notify_all();
}

bool RingAllocator::Take(uint64_t bytes, uint64_t* offset) {
  for (auto part = free_.begin(); part != free_.end(); ++part) {
    if (part->second < bytes) continue;
    *offset = part->first;
    const uint64_t left = part->second - bytes;
    free_.erase(part);
    if (left > 0) free_[*offset + bytes] = left;
    used_[*offset] = bytes;
    return true;
  }
  return false;
}

}  // namespace clusterkv::client
