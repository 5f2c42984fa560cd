// What a node without clusterkv holds, in our own layout: sequences whose window is their whole
// context, with nothing clustered, nothing selected and nothing fetched. Attend then reads all of
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "client/bench/backend.h"
#include "gpu/decode_ops.h"
#include "gpu/shape.h"
#include "gpu/state_layout.h"

namespace clusterkv::client::bench {

class FullKvState {
 public:
  // As many sequences as the device's memory holds, at most `most`.
  // Errors: RESOURCE_EXHAUSTED if not even one.
  static absl::StatusOr<std::unique_ptr<FullKvState>> Create(Backend& backend,
                                                             const gpu::Shape& shape,
                                                             uint32_t tokens, uint32_t most,
                                                             uint64_t seed);

  const gpu::StateLayout& layout() const { return layout_; }
  uint32_t sequences() const { return static_cast<uint32_t>(slots_.size()); }
  gpu::Batch slots() const { return slots_; }
  // Back to the context's length.
  absl::Status Rewind() const;

 private:
  FullKvState(Backend& backend, const gpu::StateLayout& layout, uint32_t tokens)
      : backend_(backend), layout_(layout), tokens_(tokens) {}
  absl::Status Add();
  gpu::WriteTokensArgs WriteArgs(const gpu::BatchSlot& slot, uint32_t position,
                                 uint32_t count) const;

  Backend& backend_;
  const gpu::StateLayout layout_;
  const uint32_t tokens_;
  std::unique_ptr<gpu::DeviceMemory> rows_;  // pinned [kv_heads][tokens]
  std::vector<std::unique_ptr<gpu::DeviceMemory>> states_;
  std::vector<gpu::BatchSlot> slots_;
};

}  // namespace clusterkv::client::bench
