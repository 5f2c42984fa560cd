// The tensors of a served layer as the device needs them: one of each for the whole batch, at a
// constant stride from sequence to sequence, where the device reaches it.
//
// What lies in an arena at such a stride (the client's batches do) is used in place; everything
// else goes through a pinned buffer of the daemon's.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "gpu/cluster_ops.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/shape.h"

namespace clusterkv::service {

// Where one sequence's tensors lie. In an arena: device memory; else host memory of the request.
struct ServePlace {
  struct Input {
    const std::byte* data = nullptr;
    bool in_arena = false;
  };
  Input q, k, v;
  std::byte* output = nullptr;  // fp32 output, then log-sum-exps, in an arena; null: inline
};

// Of one thread.
class ServeTensors {
 public:
  explicit ServeTensors(gpu::Device& device) : device_(device) {}

  // Enqueues the copies that are needed. Errors: RESOURCE_EXHAUSTED. All results below are valid
  // until the next call; what the inputs point to is read before this returns, or by the stream.
  absl::Status Prepare(gpu::Stream& stream, const gpu::Shape& shape,
                       std::span<const ServePlace> places);

  const gpu::QuerySource& queries() const { return queries_; }
  const gpu::KvSource& tokens() const { return tokens_; }
  const gpu::AttentionTarget& target() const { return target_; }
  // Where item i's K and V of this layer begin, as a range of one token, and the next item's.
  const std::byte* token(size_t i) const { return tokens_.k + i * tokens_.batch_stride; }
  size_t token_stride() const { return tokens_.batch_stride; }
  std::span<gpu::LayerReport> reports() const { return reports_; }

  // Outputs of the buffer to the arenas that they were asked in; nothing where they are in place.
  absl::Status ReturnOutputs(gpu::Stream& stream, std::span<const ServePlace> places) const;
  // Item i's, after the stream has passed; only where it was not asked for in an arena.
  const float* output(size_t i) const { return target_.out + i * target_.batch_stride; }
  const float* lse(size_t i) const { return target_.lse + i * target_.lse_batch_stride; }

 private:
  absl::Status Grow(size_t bytes);

  gpu::Device& device_;
  std::unique_ptr<gpu::DeviceMemory> buffer_;  // pinned; grows
  size_t output_bytes_ = 0;                    // of one item, with its log-sum-exps
  bool outputs_in_place_ = false;
  gpu::QuerySource queries_;
  gpu::KvSource tokens_;
  gpu::AttentionTarget target_;
  std::span<gpu::LayerReport> reports_;
};

}  // namespace clusterkv::service
