#include "client/bench/full_kv_state.h"

#include <algorithm>
#include <utility>

#include "client/bench/cores.h"
#include "client/bench/key_model.h"
#include "gpu/cluster_ops.h"
#include "gpu/host/thread_pool.h"
#include "gpu/method_options.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr uint32_t kGeneration = 1;
constexpr uint32_t kStepTokens = 8;              // room beyond the context
constexpr uint32_t kMostWindow = 65'536;         // that the method allows as the least window
constexpr size_t kSpareBytes = size_t{2} << 30;  // for scratch, as of clusterkv's own states

// A window for all of it, of the least window and one decode segment; the rest as small as it gets.
gpu::MethodOptions WindowOnly(uint32_t tokens) {
  gpu::MethodOptions method;
  method.min_window_tokens = std::min(tokens, kMostWindow);
  method.decode_segment_tokens = std::clamp(tokens - method.min_window_tokens, 320u, kMostWindow);
  method.prompt_segment_tokens = kMostWindow;
  method.window_lag_segments = tokens > kMostWindow ? (tokens - kMostWindow - 1) / kMostWindow : 0;
  method.tokens_per_cluster = 64;
  method.budget_tokens = 1;
  method.cache_tokens = 2 + method.largest_cluster_tokens();
  return method;
}

}  // namespace

absl::StatusOr<std::unique_ptr<FullKvState>> FullKvState::Create(Backend& backend,
                                                                 const gpu::Shape& shape,
                                                                 uint32_t tokens, uint32_t most,
                                                                 uint64_t seed) {
  CKV_ASSIGN_OR_RETURN(
      const gpu::StateLayout layout,
      gpu::StateLayout::Create(shape, WindowOnly(tokens).Resolved(shape), tokens + kStepTokens));
  std::unique_ptr<FullKvState> state(new FullKvState(backend, layout, tokens));
  CKV_ASSIGN_OR_RETURN(
      state->rows_, backend.device().AllocatePinned(shape.kv_heads * tokens * shape.row_bytes()));
  const KeyModel model(shape, tokens, seed);
  gpu::host::ThreadPool threads(UsableCores());
  threads.ParallelFor(shape.kv_heads, [&](size_t head) {
    model.WriteRows(static_cast<uint32_t>(head), 0, tokens,
                    state->rows_->data() + head * tokens * shape.row_bytes());
  });
  CKV_ASSIGN_OR_RETURN(const auto spare, backend.device().Allocate(kSpareBytes));
  while (state->sequences() < most) {
    const absl::Status added = state->Add();
    if (absl::IsResourceExhausted(added) && state->sequences() > 0) break;
    CKV_RETURN_IF_ERROR(added);
  }
  return state;
}

absl::Status FullKvState::Add() {
  gpu::Device& device = backend_.device();
  gpu::Stream& stream = backend_.stream();
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::DeviceMemory> state,
                       device.Allocate(layout_.total_bytes));
  CKV_RETURN_IF_ERROR(device.cluster_ops().Initialize(stream, state->data(), layout_, kGeneration));
  const gpu::BatchSlot slot = {
      .state = state->data(), .layout = &layout_, .generation = kGeneration, .active = 1};
  CKV_RETURN_IF_ERROR(device.decode_ops().WriteTokens(stream, WriteArgs(slot, 0, tokens_)));
  CKV_RETURN_IF_ERROR(stream.Synchronize());
  slots_.push_back(slot);
  states_.push_back(std::move(state));
  return absl::OkStatus();
}

gpu::WriteTokensArgs FullKvState::WriteArgs(const gpu::BatchSlot& slot, uint32_t position,
                                            uint32_t count) const {
  const size_t row_bytes = layout_.row_bytes();
  gpu::WriteTokensArgs args;
  args.slot = slot;
  args.layer_count = layout_.layers;
  args.position = position;
  args.count = count;
  args.source = {.k = rows_->data() + position * row_bytes,
                 .v = rows_->data() + position * row_bytes + row_bytes / 2,
                 .layer_stride = 0,  // every layer has the same tokens
                 .token_stride = row_bytes,
                 .head_stride = tokens_ * row_bytes};
  args.length_after = position + count;
  return args;
}

absl::Status FullKvState::Rewind() const {
  for (const gpu::BatchSlot& slot : slots_) {
    CKV_RETURN_IF_ERROR(backend_.device().decode_ops().WriteTokens(
        backend_.stream(), WriteArgs(slot, tokens_ - 1, 1)));
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::client::bench
