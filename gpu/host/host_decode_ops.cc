#include "gpu/host/host_decode_ops.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "gpu/decode_checks.h"
#include "gpu/host/decode_steps.h"
#include "gpu/host/host_stream.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::host {
namespace {

absl::Status EnqueueOn(Stream& stream, HostStream::Work work) {
  auto* const host_stream = dynamic_cast<HostStream*>(&stream);
  if (host_stream == nullptr) {
    return absl::InvalidArgumentError("the stream is not one of the host backend");
  }
  return host_stream->Enqueue(std::move(work));
}

bool IsUsable(const BatchSlot& slot) {
  return slot.active != 0 && slot.state != nullptr && slot.layout != nullptr;
}

bool IsCurrent(const BatchSlot& slot) {
  return IsUsable(slot) && StateView(slot).IsCurrent(slot.generation);
}

// Errors of the step so far, which are cleared. The block may be another sequence's by now: only
// its own slot may clear its errors.
uint32_t TakeErrors(const BatchSlot& slot) {
  if (!IsCurrent(slot)) return kStaleGeneration;
  return std::exchange(StateView(slot).latch().errors, 0);
}

// All (slot, KV head) pairs of a batch, in parallel. `body(slot_index, kv_head)`.
template <typename Body>
void ForEachHead(ThreadPool& pool, Batch batch, const Body& body) {
  uint32_t kv_heads = 0;
  for (const BatchSlot& slot : batch) {
    if (IsUsable(slot)) kv_heads = std::max(kv_heads, slot.layout->kv_heads);
  }
  pool.ParallelFor(batch.size() * kv_heads, [&](size_t i) {
    const size_t index = i / kv_heads;
    const auto kv_head = static_cast<uint32_t>(i % kv_heads);
    if (IsUsable(batch[index]) && kv_head < batch[index].layout->kv_heads) body(index, kv_head);
  });
}

void WriteHead(const WriteTokensArgs& args, uint32_t layer_offset, uint32_t kv_head) {
  const StateView view(args.slot);
  const StateLayout& layout = view.layout();
  const size_t head = layout.head_index(args.layer_begin + layer_offset, kv_head);
  const size_t base = layer_offset * args.source.layer_stride + kv_head * args.source.head_stride;
  // Of the tokens that would share a window slot only the newest stays: skip the others.
  const uint32_t end = args.position + args.count;
  const uint32_t newest = end > layout.window_slots ? end - layout.window_slots : 0;
  for (uint32_t token = 0; token < args.count; ++token) {
    const uint32_t position = args.position + token;
    if (position >= layout.sink_tokens && position < newest) continue;
    const size_t offset = base + token * args.source.token_stride;
    WriteToken(view, head, position, args.source.k + offset, args.source.v + offset);
  }
}

void BeginSlot(const BatchSlot& slot) {
  const StateView view(slot);
  const StateLayout& layout = view.layout();
  StepLatch& latch = view.latch();
  // Acquire: what was published with the count is seen by all that follows in this step.
  const uint32_t published = view.published_segments().load(std::memory_order_acquire);
  latch.segments = std::min(published, layout.max_segments);
  latch.cut = latch.segments == 0 ? layout.sink_tokens : view.segment_ends()[latch.segments - 1];
  ++latch.length;
  ++latch.step;
  const uint32_t begin = view.WindowBegin();
  if (latch.length > begin && latch.length - begin > layout.window_slots) {
    latch.errors |= kWindowOverflow;
  }
}

GroupQueries QueriesOf(const QuerySource& queries, size_t index, uint32_t kv_head,
                       uint32_t group_size) {
  const size_t first_head = size_t{kv_head} * group_size;
  return {.q = queries.q + index * queries.batch_stride + first_head * queries.head_stride,
          .head_stride = queries.head_stride};
}

GroupTarget TargetOf(const AttentionTarget& target, size_t index, uint32_t kv_head,
                     uint32_t group_size) {
  const size_t first_head = size_t{kv_head} * group_size;
  return {.out = target.out + index * target.batch_stride + first_head * target.head_stride,
          .head_stride = target.head_stride,
          .lse = target.lse == nullptr ? nullptr
                                       : target.lse + index * target.lse_batch_stride + first_head};
}

}  // namespace

void WriteToken(const StateView& view, size_t head, uint32_t position, const std::byte* k,
                const std::byte* v) {
  std::byte* const row = position < view.layout().sink_tokens ? view.sink(head, position)
                                                              : view.window(head, position);
  std::memcpy(row, k, view.mean_bytes());
  std::memcpy(row + view.mean_bytes(), v, view.mean_bytes());
}

absl::Status HostDecodeOps::WriteTokens(Stream& stream, const WriteTokensArgs& args) {
  CKV_RETURN_IF_ERROR(CheckWriteTokens(args));
  return EnqueueOn(stream, [this, args] {
    if (!IsCurrent(args.slot)) return absl::OkStatus();
    const uint32_t kv_heads = args.slot.layout->kv_heads;
    pool_.ParallelFor(size_t{args.layer_count} * kv_heads, [&](size_t i) {
      WriteHead(args, static_cast<uint32_t>(i / kv_heads), static_cast<uint32_t>(i % kv_heads));
    });
    if (args.length_after != 0) StateView(args.slot).latch().length = args.length_after;
    return absl::OkStatus();
  });
}

absl::Status HostDecodeOps::LoadBatch(Stream& stream, Batch batch) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, 0));
  return EnqueueOn(stream, [] { return absl::OkStatus(); });  // each call brings its batch along
}

absl::Status HostDecodeOps::BeginStep(Stream& stream, Batch batch) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, 0));
  return EnqueueOn(stream, [batch] {
    for (const BatchSlot& slot : batch) {
      if (IsCurrent(slot)) BeginSlot(slot);
    }
    return absl::OkStatus();
  });
}

absl::Status HostDecodeOps::Append(Stream& stream, Batch batch, uint32_t layer,
                                   const KvSource& source) {
  CKV_RETURN_IF_ERROR(CheckAppend(batch, layer, source));
  return EnqueueOn(stream, [batch, layer, source] {
    for (size_t i = 0; i < batch.size(); ++i) {
      if (!IsCurrent(batch[i])) continue;
      const StateView view(batch[i]);
      const uint32_t length = view.latch().length;
      if (length == 0) continue;
      for (uint32_t kv_head = 0; kv_head < view.layout().kv_heads; ++kv_head) {
        const size_t offset = i * source.batch_stride + kv_head * source.head_stride;
        WriteToken(view, view.layout().head_index(layer, kv_head), length - 1, source.k + offset,
                   source.v + offset);
        if (batch[i].tail != nullptr) {
          std::byte* const tail =
              batch[i].tail + 2 * layer * batch[i].tail_stride + kv_head * view.mean_bytes();
          std::memcpy(tail, source.k + offset, view.mean_bytes());
          std::memcpy(tail + batch[i].tail_stride, source.v + offset, view.mean_bytes());
        }
      }
    }
    return absl::OkStatus();
  });
}

absl::Status HostDecodeOps::Select(Stream& stream, Batch batch, uint32_t layer,
                                   const QuerySource& queries, uint32_t budget_tokens) {
  CKV_RETURN_IF_ERROR(CheckSelect(batch, layer, queries, budget_tokens));
  return EnqueueOn(stream, [this, batch, layer, queries, budget_tokens] {
    ForEachHead(pool_, batch, [&](size_t index, uint32_t kv_head) {
      if (!IsCurrent(batch[index])) return;
      const StateView view(batch[index]);
      SelectHead(view, layer, kv_head, QueriesOf(queries, index, kv_head, view.layout().group_size),
                 budget_tokens);
    });
    return absl::OkStatus();
  });
}

absl::Status HostDecodeOps::Fetch(Stream& stream, Batch batch, uint32_t layer) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, layer));
  return EnqueueOn(stream, [this, batch, layer] {
    std::mutex mutex;
    absl::Status first_error;
    ForEachHead(pool_, batch, [&](size_t index, uint32_t kv_head) {
      const BatchSlot& slot = batch[index];
      if (!IsCurrent(slot)) return;
      absl::Status status = FetchHead(slot, StateView(slot), layer, kv_head);
      if (status.ok()) return;
      const std::lock_guard lock(mutex);
      if (first_error.ok()) first_error = std::move(status);
    });
    return first_error;
  });
}

absl::Status HostDecodeOps::Attend(Stream& stream, Batch batch, uint32_t layer,
                                   const QuerySource& queries, const AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(CheckAttend(batch, layer, queries, target));
  return EnqueueOn(stream, [this, batch, layer, queries, target] {
    ForEachHead(pool_, batch, [&](size_t index, uint32_t kv_head) {
      const BatchSlot& slot = batch[index];
      const uint32_t group_size = slot.layout->group_size;
      const GroupTarget group_target = TargetOf(target, index, kv_head, group_size);
      if (!IsCurrent(slot)) return AttendNothing(*slot.layout, group_target);
      AttendHead(StateView(slot), layer, kv_head, QueriesOf(queries, index, kv_head, group_size),
                 group_target);
    });
    return absl::OkStatus();
  });
}

absl::Status HostDecodeOps::DecodeLayer(Stream& stream, Batch batch, uint32_t layer,
                                        const QuerySource& queries, uint32_t budget_tokens,
                                        const AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(CheckSelect(batch, layer, queries, budget_tokens));
  CKV_RETURN_IF_ERROR(CheckAttend(batch, layer, queries, target));
  CKV_RETURN_IF_ERROR(Select(stream, batch, layer, queries, budget_tokens));
  CKV_RETURN_IF_ERROR(Fetch(stream, batch, layer));
  return Attend(stream, batch, layer, queries, target);
}

absl::Status HostDecodeOps::EndStep(Stream& stream, Batch batch, absl::Span<uint32_t> errors) {
  CKV_RETURN_IF_ERROR(CheckResults(batch, 0, errors.size()));
  return EnqueueOn(stream, [batch, errors] {
    for (size_t i = 0; i < batch.size(); ++i) {
      errors[i] = IsUsable(batch[i]) ? TakeErrors(batch[i]) : 0;
    }
    return absl::OkStatus();
  });
}

absl::Status HostDecodeOps::ReportLayer(Stream& stream, Batch batch, uint32_t layer,
                                        absl::Span<LayerReport> reports) {
  CKV_RETURN_IF_ERROR(CheckResults(batch, layer, reports.size()));
  return EnqueueOn(stream, [batch, layer, reports] {
    for (size_t i = 0; i < batch.size(); ++i) {
      reports[i] = {};
      if (!IsUsable(batch[i])) continue;
      reports[i].errors = TakeErrors(batch[i]);
      if (!IsCurrent(batch[i])) continue;
      const StateView view(batch[i]);
      reports[i].cut = view.latch().cut;
      reports[i].counters = view.counters(layer);
    }
    return absl::OkStatus();
  });
}

}  // namespace clusterkv::gpu::host
