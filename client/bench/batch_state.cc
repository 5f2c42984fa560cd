#include "client/bench/batch_state.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr uint32_t kGeneration = 1;
constexpr uint32_t kStepTokens = 8;  // room beyond the context
constexpr size_t kSpareBytes = size_t{2} << 30;

}  // namespace

absl::StatusOr<std::unique_ptr<BatchState>> BatchState::Create(Backend& backend,
                                                               const PublishedContext& context,
                                                               uint32_t budget_tokens,
                                                               uint32_t sequences, Fit fit) {
  const ContextOptions& options = context.options();
  gpu::MethodOptions method = options.method;
  method.budget_tokens = budget_tokens;
  CKV_ASSIGN_OR_RETURN(const gpu::StateLayout layout,
                       gpu::StateLayout::Create(options.shape, method.Resolved(options.shape),
                                                options.tokens + kStepTokens));
  std::unique_ptr<BatchState> state(new BatchState(backend, context, layout));
  CKV_RETURN_IF_ERROR(state->Prepare(sequences, fit));
  return state;
}

absl::Status BatchState::Prepare(uint32_t sequences, Fit fit) {
  capacity_ = sequences;
  const ContextOptions& options = context_.options();
  const gpu::Shape& shape = options.shape;
  gpu::Device& device = backend_.device();
  CKV_ASSIGN_OR_RETURN(chunks_, device.AllocatePinned(sizeof(const std::byte*)));
  reinterpret_cast<const std::byte**>(chunks_->data())[0] = context_.store();
  const auto write_rows = [&](uint32_t begin, uint32_t count,
                              std::unique_ptr<gpu::DeviceMemory>& memory) -> absl::Status {
    const size_t head_bytes = std::max(1u, count) * shape.row_bytes();
    CKV_ASSIGN_OR_RETURN(memory, device.AllocatePinned(shape.kv_heads * head_bytes));
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      context_.model().WriteRows(head, begin, count, memory->data() + head * head_bytes);
    }
    return absl::OkStatus();
  };
  CKV_RETURN_IF_ERROR(write_rows(0, layout_.sink_tokens, sinks_));
  CKV_RETURN_IF_ERROR(write_rows(context_.cut(), options.tokens - context_.cut(), window_));

  // Through pinned memory, so that the copies need no staging.
  const size_t query_bytes = shape.q_heads * shape.head_dim * gpu::SizeOf(shape.dtype);
  const size_t token_bytes = shape.kv_heads * shape.row_bytes();
  CKV_ASSIGN_OR_RETURN(queries_, device.Allocate(shape.layers * sequences * query_bytes));
  CKV_ASSIGN_OR_RETURN(tokens_, device.Allocate(sequences * token_bytes));
  CKV_ASSIGN_OR_RETURN(
      outputs_, device.Allocate(sequences * shape.q_heads * (shape.head_dim + 1) * sizeof(float)));
  CKV_ASSIGN_OR_RETURN(const auto staged_queries, device.AllocatePinned(queries_->bytes()));
  CKV_ASSIGN_OR_RETURN(const auto staged_tokens, device.AllocatePinned(tokens_->bytes()));
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (uint32_t i = 0; i < sequences; ++i) {
      context_.model().WriteQueries(
          i, layer, staged_queries->data() + (size_t{layer} * sequences + i) * query_bytes);
    }
  }
  for (uint32_t i = 0; i < sequences; ++i) {
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      context_.model().WriteRows(
          head, i % options.tokens, 1,
          staged_tokens->data() + i * token_bytes + head * shape.row_bytes());
    }
  }
  gpu::Stream& stream = backend_.stream();
  CKV_RETURN_IF_ERROR(
      stream.CopyAsync(queries_->data(), staged_queries->data(), queries_->bytes()));
  CKV_RETURN_IF_ERROR(stream.CopyAsync(tokens_->data(), staged_tokens->data(), tokens_->bytes()));
  CKV_RETURN_IF_ERROR(stream.Synchronize());
  // Room for what measuring takes beside the states: scratch, edits, events.
  std::unique_ptr<gpu::DeviceMemory> spare;
  if (fit == Fit::kAsManyAsFit) {
    CKV_ASSIGN_OR_RETURN(spare, device.Allocate(kSpareBytes));
  }
  for (uint32_t i = 0; i < sequences; ++i) {
    const absl::Status status = AddSequence(i);
    if (absl::IsResourceExhausted(status) && fit == Fit::kAsManyAsFit && i > 0) break;
    if (!status.ok()) {
      return absl::Status(status.code(),
                          absl::StrCat("sequence ", i, " of ", sequences, ", ", layout_.total_bytes,
                                       " bytes each: ", status.message()));
    }
  }
  return absl::OkStatus();
}

absl::Status BatchState::AddSequence(uint32_t index) {
  gpu::Device& device = backend_.device();
  gpu::Stream& stream = backend_.stream();
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::DeviceMemory> state,
                       device.Allocate(layout_.total_bytes));
  CKV_RETURN_IF_ERROR(device.cluster_ops().Initialize(stream, state->data(), layout_, kGeneration));
  CKV_RETURN_IF_ERROR(context_.PublishTo(state->data(), layout_));
  slots_.push_back({.state = state->data(),
                    .layout = &layout_,
                    .host_chunks = reinterpret_cast<const std::byte* const*>(chunks_->data()),
                    .chunk_count = 1,
                    .generation = kGeneration,
                    .active = 1});
  states_.push_back(std::move(state));
  const uint32_t tokens = context_.options().tokens;
  CKV_RETURN_IF_ERROR(device.decode_ops().WriteTokens(
      stream, WriteArgs(index, 0, layout_.sink_tokens, sinks_->data())));
  CKV_RETURN_IF_ERROR(device.decode_ops().WriteTokens(
      stream, WriteArgs(index, context_.cut(), tokens - context_.cut(), window_->data())));
  return stream.Synchronize();
}

gpu::WriteTokensArgs BatchState::WriteArgs(uint32_t index, uint32_t position, uint32_t count,
                                           const std::byte* rows) const {
  const size_t row_bytes = layout_.row_bytes();
  gpu::WriteTokensArgs args;
  args.slot = slots_[index];
  args.layer_count = layout_.layers;
  args.position = position;
  args.count = count;
  args.source = {.k = rows,
                 .v = rows + row_bytes / 2,
                 .layer_stride = 0,  // every layer has the same tokens
                 .token_stride = row_bytes,
                 .head_stride = count * row_bytes};
  args.length_after = position + count;
  return args;
}

gpu::QuerySource BatchState::queries(uint32_t layer) const {
  const size_t head_bytes = layout_.head_dim * gpu::SizeOf(layout_.dtype);
  const size_t sequence_bytes = size_t{layout_.kv_heads} * layout_.group_size * head_bytes;
  return {.q = queries_->data() + size_t{layer} * capacity_ * sequence_bytes,
          .batch_stride = sequence_bytes,
          .head_stride = head_bytes};
}

gpu::KvSource BatchState::tokens() const {
  const size_t row_bytes = layout_.row_bytes();
  return {.k = tokens_->data(),
          .v = tokens_->data() + row_bytes / 2,
          .batch_stride = layout_.kv_heads * row_bytes,
          .head_stride = row_bytes};
}

gpu::AttentionTarget BatchState::target() const {
  const size_t q_heads = size_t{layout_.kv_heads} * layout_.group_size;
  auto* const out = reinterpret_cast<float*>(outputs_->data());
  return {.out = out,
          .batch_stride = q_heads * layout_.head_dim,
          .head_stride = layout_.head_dim,
          .lse = out + capacity_ * q_heads * layout_.head_dim,
          .lse_batch_stride = q_heads};
}

absl::Status BatchState::Rewind(uint32_t sequences) const {
  gpu::DecodeOps& ops = backend_.device().decode_ops();
  const uint32_t tokens = context_.options().tokens;
  const std::byte* const last =
      window_->data() + (tokens - context_.cut() - 1) * layout_.row_bytes();
  for (uint32_t i = 0; i < sequences; ++i) {
    gpu::WriteTokensArgs args = WriteArgs(i, tokens - 1, 1, last);
    args.source.head_stride = (tokens - context_.cut()) * layout_.row_bytes();
    CKV_RETURN_IF_ERROR(ops.WriteTokens(backend_.stream(), args));
  }
  return absl::OkStatus();
}

absl::Status BatchState::Begin(uint32_t sequences) const {
  CKV_RETURN_IF_ERROR(Rewind(sequences));
  return backend_.device().decode_ops().BeginStep(backend_.stream(), slots(sequences));
}

absl::StatusOr<Selections> BatchState::SelectAll(uint32_t sequences) const {
  Selections selections(sequences * layout_.head_index(layout_.layers, 0));
  for (uint32_t layer = 0; layer < layout_.layers; ++layer) {
    CKV_RETURN_IF_ERROR(backend_.device().decode_ops().Select(
        backend_.stream(), slots(sequences), layer, queries(layer), budget_tokens()));
    CKV_RETURN_IF_ERROR(ReadSelection(sequences, layer, selections));
  }
  return selections;
}

absl::Status BatchState::ReadSelection(uint32_t sequences, uint32_t layer,
                                       Selections& selections) const {
  gpu::Stream& stream = backend_.stream();
  const uint32_t heads = layout_.kv_heads;
  std::vector<uint32_t> counts(heads), clusters(size_t{heads} * layout_.budget_tokens);
  for (uint32_t i = 0; i < sequences; ++i) {
    const std::byte* const state = slots_[i].state;
    CKV_RETURN_IF_ERROR(stream.CopyAsync(counts.data(), state + layout_.selected_count,
                                         counts.size() * sizeof(uint32_t)));
    CKV_RETURN_IF_ERROR(stream.CopyAsync(clusters.data(), state + layout_.selected_cluster,
                                         clusters.size() * sizeof(uint32_t)));
    CKV_RETURN_IF_ERROR(stream.Synchronize());
    for (uint32_t head = 0; head < heads; ++head) {
      const auto first = clusters.begin() + head * layout_.budget_tokens;
      selections[i * layout_.head_index(layout_.layers, 0) + layout_.head_index(layer, head)]
          .assign(first, first + counts[head]);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<gpu::LayerCounters> BatchState::ReadCounters(uint32_t sequences) const {
  gpu::LayerCounters sum = {};
  std::vector<gpu::LayerCounters> counters(layout_.layers);
  for (uint32_t i = 0; i < sequences; ++i) {
    CKV_RETURN_IF_ERROR(backend_.stream().CopyAsync(counters.data(),
                                                    slots_[i].state + layout_.counters,
                                                    counters.size() * sizeof(gpu::LayerCounters)));
    CKV_RETURN_IF_ERROR(backend_.stream().Synchronize());
    for (const gpu::LayerCounters& layer : counters) {
      sum.hit_clusters += layer.hit_clusters;
      sum.missed_clusters += layer.missed_clusters;
      sum.hit_tokens += layer.hit_tokens;
      sum.missed_tokens += layer.missed_tokens;
      sum.gathered_bytes += layer.gathered_bytes;
    }
  }
  return sum;
}

uint32_t BatchState::attended_rows() const {
  const uint32_t candidates = context_.cut() - layout_.sink_tokens;
  return layout_.sink_tokens + std::min(budget_tokens(), candidates) + window_rows();
}

}  // namespace clusterkv::client::bench
