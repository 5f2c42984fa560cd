#include "client/kv_packer.h"

#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

// An eighth of what the host backend's stream can queue.
constexpr uint32_t kMaxEnqueued = 8192;

}  // namespace

absl::Status KvPacker::Pack(std::byte* destination, const StridedRows& rows) {
  const size_t token_bytes = rows.heads * rows.row_bytes;
  const bool heads_adjoin = rows.heads == 1 || rows.head_stride == rows.row_bytes;
  const bool tokens_adjoin = heads_adjoin && (rows.tokens == 1 || rows.token_stride == token_bytes);
  if (tokens_adjoin) return Copy(destination, rows.data, rows.tokens * token_bytes);
  for (uint32_t token = 0; token < rows.tokens; ++token) {
    const std::byte* const source = rows.data + token * rows.token_stride;
    std::byte* const target = destination + token * token_bytes;
    if (heads_adjoin) {
      CKV_RETURN_IF_ERROR(Copy(target, source, token_bytes));
      continue;
    }
    for (uint32_t head = 0; head < rows.heads; ++head) {
      CKV_RETURN_IF_ERROR(
          Copy(target + head * rows.row_bytes, source + head * rows.head_stride, rows.row_bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status KvPacker::Copy(void* destination, const void* source, size_t bytes) {
  if (++enqueued_ > kMaxEnqueued) {
    CKV_RETURN_IF_ERROR(stream_.Synchronize());
    enqueued_ = 1;
  }
  return stream_.CopyAsync(destination, source, bytes);
}

}  // namespace clusterkv::client
