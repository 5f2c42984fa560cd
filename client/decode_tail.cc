#include "client/decode_tail.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {

absl::Status DecodeTail::Reserve(uint32_t position, uint32_t capacity) {
  if (range_.has_value()) return absl::OkStatus();
  const Deadline now(absl::ZeroDuration());
  absl::Status refused;
  for (uint32_t tokens = std::max(1u, capacity); tokens > 0; tokens /= 2) {
    const absl::StatusOr<uint64_t> offset =
        ring_.Allocate(RangeLayout(shape_, shape_.layers, tokens).bytes(), now);
    if (offset.ok()) {
      range_ = *offset;
      position_ = position;
      capacity_ = tokens;
      count_ = 0;
      return absl::OkStatus();
    }
    refused = offset.status();
  }
  return refused;
}

std::byte* DecodeTail::token(std::byte* ring_data) const {
  const RangeLayout layout(shape_, shape_.layers, capacity_);
  return ring_data + *range_ + layout.k_offset(0) + count_ * layout.token_bytes();
}

absl::Status DecodeTail::Compact(KvPacker& packer, std::byte* ring_data) const {
  const RangeLayout wide(shape_, shape_.layers, capacity_);
  const RangeLayout narrow(shape_, shape_.layers, count_);
  // A block moves down by `gap`. In pieces of at most that, one after the other, no copy overlaps
  // itself, and none reaches what has not been moved yet.
  for (size_t block = 1; block < wide.blocks(); ++block) {
    std::byte* const from = ring_data + *range_ + block * wide.block_bytes();
    std::byte* const to = ring_data + *range_ + block * narrow.block_bytes();
    const auto gap = static_cast<size_t>(from - to);
    if (gap == 0) break;
    for (size_t done = 0; done < narrow.block_bytes(); done += gap) {
      CKV_RETURN_IF_ERROR(
          packer.Copy(to + done, from + done, std::min(gap, narrow.block_bytes() - done)));
    }
  }
  return absl::OkStatus();
}

DecodeTail::Range DecodeTail::Take() {
  const Range range{.offset = *range_, .position = position_, .count = count_};
  ring_.Shrink(*range_, RangeLayout(shape_, shape_.layers, count_).bytes());
  range_.reset();
  count_ = 0;
  return range;
}

void DecodeTail::Drop() {
  if (range_.has_value()) ring_.Release(*range_);
  range_.reset();
  count_ = 0;
}

}  // namespace clusterkv::client
