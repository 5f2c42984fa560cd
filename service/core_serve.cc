// Served fetch: one layer of a decode step, on the daemon's device, for an RPC.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "gpu/cluster_ops.h"
#include "gpu/decode_ops.h"
#include "gpu/selection.h"
#include "gpu/status_macros.h"
#include "service/core.h"

namespace clusterkv::service {
namespace {

constexpr size_t kMaxItems = 256;

}  // namespace

// Lives from admission to the reply; the sequences stay while it is in flight.
struct ServiceCore::ServeWork {
  struct Item {
    Sequence* sequence = nullptr;
    bool repeated = false;
    const std::byte *q = nullptr, *k = nullptr, *v = nullptr;
    std::byte* output = nullptr;              // in an arena; null: inline
    std::vector<std::vector<RowSpan>> spans;  // per KV head, where this token is staged
    std::vector<std::byte> token;             // K then V, as a range of one token
    gpu::LayerCounters before{}, after{};
    std::vector<gpu::LayerCounters> all_counters;
    FetchResult result;
    absl::Status failure;  // of this sequence alone
  };
  SessionId session = 0;
  FetchRequest request;  // owns the inline bytes
  uint32_t budget_tokens = 0;
  std::vector<Item> items;
  Completion<std::vector<FetchResult>> done;
};

void ServiceCore::FetchClusters(SessionKey key, FetchRequest request,
                                Completion<std::vector<FetchResult>> done) {
  Call<std::vector<FetchResult>>(std::move(done),
                                 [this, key = std::move(key), request = std::move(request)](
                                     Completion<std::vector<FetchResult>> reply) mutable {
                                   auto session = FindSession(key);
                                   if (!session.ok()) return reply(session.status());
                                   DoFetch(**session, std::move(request), std::move(reply));
                                 });
}

void ServiceCore::DoFetch(Session& session, FetchRequest request,
                          Completion<std::vector<FetchResult>> done) {
  if (request.items.empty() || request.items.size() > kMaxItems) {
    return done(absl::InvalidArgumentError(
        fmt::format("{} items, allowed are 1 to {}", request.items.size(), kMaxItems)));
  }
  auto work = std::make_shared<ServeWork>();
  work->session = session.id;
  work->request = std::move(request);
  std::set<SequenceId> seen;
  for (const FetchItem& item : work->request.items) {
    if (!seen.insert(item.sequence).second) {
      return done(
          absl::InvalidArgumentError(fmt::format("sequence {} is there twice", item.sequence)));
    }
    if (absl::Status bad = PrepareItem(session, work->request, item, *work); !bad.ok()) {
      return done(bad);
    }
  }
  // Memory for the tokens, all or nothing.
  const uint32_t layer = work->request.layer;
  std::vector<PieceTable::Admission> admissions;
  for (const ServeWork::Item& item : work->items) {
    const uint32_t position = item.sequence->layers[layer].accepted;
    auto admission = item.repeated ? absl::StatusOr<PieceTable::Admission>(PieceTable::Admission{})
                                   : item.sequence->pieces.Plan(layer, 1, position + 1, false);
    if (!admission.ok()) {
      for (size_t i = 0; i < admissions.size(); ++i) {
        work->items[i].sequence->pieces.Discard(admissions[i]);
      }
      return done(admission.status());
    }
    admissions.push_back(*std::move(admission));
  }
  for (size_t i = 0; i < work->items.size(); ++i) {
    ServeWork::Item& item = work->items[i];
    Sequence& sequence = *item.sequence;
    ++sequence.in_flight;
    sequence.step.in_flight = true;
    if (item.repeated) continue;
    const uint32_t position = work->request.items[i].position;
    sequence.pieces.Commit(std::move(admissions[i]), layer,
                           std::max(position, sequence.method.sink_tokens), position + 1,
                           item.spans);
    sequence.layers[layer].accepted = position + 1;
    sequence.step.started = true;
    sequence.step.position = position;
    sequence.step.next_layer = layer + 1;
  }
  work->done = std::move(done);
  serve_.Post([this, work] {
    absl::Status status = RunServe(*work);
    core_.Post([this, work, status] { FinishServe(work, status); });
  });
}

absl::Status ServiceCore::PrepareItem(Session& session, const FetchRequest& request,
                                      const FetchItem& item, ServeWork& work) {
  CKV_ASSIGN_OR_RETURN(Sequence* const sequence, FindSequence(session, item.sequence));
  const gpu::Shape& shape = sequence->request.shape;
  const auto refuse = [&](absl::StatusCode code, const std::string& what) {
    return absl::Status(code, fmt::format("sequence {}: {}", item.sequence, what));
  };
  if (!sequence->served()) {
    return refuse(absl::StatusCode::kFailedPrecondition, "it is fetched directly");
  }
  if (request.layer >= shape.layers) {
    return refuse(absl::StatusCode::kInvalidArgument,
                  fmt::format("layer {} of {}", request.layer, shape.layers));
  }
  const uint32_t budget =
      request.budget_tokens > 0 ? request.budget_tokens : sequence->method.budget_tokens;
  if (budget > sequence->method.budget_tokens) {
    return refuse(
        absl::StatusCode::kInvalidArgument,
        fmt::format("budget_tokens {} is above its {}", budget, sequence->method.budget_tokens));
  }
  if (!work.items.empty() &&
      (!(work.items.front().sequence->request.shape == shape) || work.budget_tokens != budget)) {
    return refuse(absl::StatusCode::kInvalidArgument, "another shape or budget than the first's");
  }
  work.budget_tokens = budget;
  if (sequence->step.in_flight) {
    return refuse(absl::StatusCode::kAborted, "another call on it has not returned");
  }
  if (!sequence->prompt_ended() || !WaitIsOver(*sequence, *sequence->prompt_tokens)) {
    return refuse(absl::StatusCode::kFailedPrecondition, "its prompt is not published yet");
  }

  ServeWork::Item added;
  added.sequence = sequence;
  const ServedStep& step = sequence->step;
  const uint32_t length = step.started ? step.position + 1 : *sequence->prompt_tokens;
  const bool complete = !step.started || step.next_layer == shape.layers;
  added.repeated =
      step.started && item.position == step.position && request.layer + 1 == step.next_layer;
  if (!added.repeated) {
    const uint32_t position = complete ? length : step.position;
    const uint32_t layer = complete ? 0 : step.next_layer;
    if (item.position != position || request.layer != layer) {
      return refuse(absl::StatusCode::kFailedPrecondition,
                    fmt::format("position {} layer {} expected, not {} and {}", position, layer,
                                item.position, request.layer));
    }
    if (position >= sequence->request.max_tokens) {
      return refuse(absl::StatusCode::kOutOfRange,
                    fmt::format("position {} is beyond max_tokens {}", position,
                                sequence->request.max_tokens));
    }
    if (position + 1 - std::min(position, sequence->cut) > sequence->layout.window_slots) {
      return refuse(absl::StatusCode::kResourceExhausted,
                    fmt::format("its window of {} tokens is full until more is published",
                                sequence->layout.window_slots));
    }
  }
  const size_t row = shape.head_dim * gpu::SizeOf(shape.dtype);
  const auto resolve = [&](const TensorPlace& place, size_t bytes,
                           const char* name) -> absl::StatusOr<const std::byte*> {
    const size_t given = place.arena == 0 ? place.inline_bytes.size() : place.bytes;
    if (given != bytes) {
      return refuse(absl::StatusCode::kInvalidArgument,
                    fmt::format("{} has {} bytes, not {}", name, given, bytes));
    }
    if (place.arena == 0) return reinterpret_cast<const std::byte*>(place.inline_bytes.data());
    return ArenaBytes(session, place.arena, place.offset, place.bytes);
  };
  CKV_ASSIGN_OR_RETURN(added.q, resolve(item.q, shape.q_heads * row, "q"));
  CKV_ASSIGN_OR_RETURN(added.k, resolve(item.k, shape.kv_heads * row, "k"));
  CKV_ASSIGN_OR_RETURN(added.v, resolve(item.v, shape.kv_heads * row, "v"));
  if (item.output) {
    CKV_ASSIGN_OR_RETURN(
        const std::byte* output,
        resolve(*item.output, shape.q_heads * (shape.head_dim + 1) * sizeof(float), "output"));
    added.output = const_cast<std::byte*>(output);
  }
  added.result.sequence = item.sequence;
  work.items.push_back(std::move(added));
  return absl::OkStatus();
}

absl::Status ServiceCore::RunServe(ServeWork& work) {
  const Sequence& first = *work.items.front().sequence;
  const gpu::Shape& shape = first.request.shape;
  const uint32_t layer = work.request.layer;
  const size_t count = work.items.size();
  const size_t row = shape.head_dim * gpu::SizeOf(shape.dtype);
  const size_t q_bytes = shape.q_heads * row;
  const size_t kv_bytes = shape.kv_heads * row;
  const size_t out_floats = size_t{shape.q_heads} * shape.head_dim;

  std::vector<gpu::BatchSlot> batch, beginning;
  std::vector<std::byte> q(count * q_bytes), k(count * kv_bytes), v(count * kv_bytes);
  std::vector<float> out(count * out_floats), lse(count * shape.q_heads);
  std::vector<uint32_t> errors(count);
  for (size_t i = 0; i < count; ++i) {
    ServeWork::Item& item = work.items[i];
    batch.push_back(item.sequence->slot());
    if (layer == 0 && !item.repeated) beginning.push_back(batch.back());
    std::memcpy(q.data() + i * q_bytes, item.q, q_bytes);
    std::memcpy(k.data() + i * kv_bytes, item.k, kv_bytes);
    std::memcpy(v.data() + i * kv_bytes, item.v, kv_bytes);
    item.token.assign(k.data() + i * kv_bytes, k.data() + (i + 1) * kv_bytes);
    item.token.insert(item.token.end(), v.data() + i * kv_bytes, v.data() + (i + 1) * kv_bytes);
    item.all_counters.resize(item.sequence->layout.layers);
  }
  const gpu::QuerySource queries{.q = q.data(), .batch_stride = q_bytes, .head_stride = row};
  const gpu::KvSource token{
      .k = k.data(), .v = v.data(), .batch_stride = kv_bytes, .head_stride = row};
  const gpu::AttentionTarget target{.out = out.data(),
                                    .batch_stride = out_floats,
                                    .head_stride = shape.head_dim,
                                    .lse = lse.data(),
                                    .lse_batch_stride = shape.q_heads};
  gpu::DecodeOps& ops = device_->decode_ops();
  gpu::Stream& stream = *serve_stream_;
  const auto counters_of = [&](const ServeWork::Item& item) {
    return item.sequence->state->data() + item.sequence->layout.counters;
  };
  const auto enqueue = [&]() -> absl::Status {
    for (ServeWork::Item& item : work.items) {
      CKV_RETURN_IF_ERROR(stream.CopyAsync(&item.before,
                                           counters_of(item) + layer * sizeof(gpu::LayerCounters),
                                           sizeof(gpu::LayerCounters)));
      if (item.repeated || item.spans.front().empty()) continue;
      gpu::StageArgs stage{.range = item.token.data(),
                           .range_tokens = 1,
                           .first_token = 0,
                           .count = 1,
                           .layer_count = 1,
                           .kv_heads = shape.kv_heads,
                           .head_dim = shape.head_dim,
                           .dtype = shape.dtype,
                           .destinations = {}};
      for (const auto& spans : item.spans) stage.destinations.push_back(spans.front().data);
      CKV_RETURN_IF_ERROR(device_->cluster_ops().Stage(stream, std::move(stage)));
    }
    if (!beginning.empty()) CKV_RETURN_IF_ERROR(ops.BeginStep(stream, beginning));
    CKV_RETURN_IF_ERROR(ops.Append(stream, batch, layer, token));
    CKV_RETURN_IF_ERROR(ops.Select(stream, batch, layer, queries, work.budget_tokens));
    CKV_RETURN_IF_ERROR(ops.Fetch(stream, batch, layer));
    CKV_RETURN_IF_ERROR(ops.Attend(stream, batch, layer, queries, target));
    for (ServeWork::Item& item : work.items) {
      CKV_RETURN_IF_ERROR(stream.CopyAsync(item.all_counters.data(), counters_of(item),
                                           item.all_counters.size() * sizeof(gpu::LayerCounters)));
    }
    return ops.EndStep(stream, batch, absl::MakeSpan(errors));
  };
  const absl::Status status = enqueue();
  const absl::Status finished = stream.Synchronize();
  CKV_RETURN_IF_ERROR(status);
  CKV_RETURN_IF_ERROR(finished);

  for (size_t i = 0; i < count; ++i) {
    ServeWork::Item& item = work.items[i];
    if (errors[i] != 0) {
      item.failure = absl::InternalError(
          fmt::format("sequence {}: step error bits {}", item.result.sequence, errors[i]));
      continue;
    }
    item.after = item.all_counters[layer];
    item.result.hit_clusters =
        static_cast<uint32_t>(item.after.hit_clusters - item.before.hit_clusters);
    item.result.missed_clusters =
        static_cast<uint32_t>(item.after.missed_clusters - item.before.missed_clusters);
    item.result.hit_tokens = item.after.hit_tokens - item.before.hit_tokens;
    item.result.missed_tokens = item.after.missed_tokens - item.before.missed_tokens;
    item.result.gathered_bytes = item.after.gathered_bytes - item.before.gathered_bytes;
    gpu::StepLatch latch;
    CKV_RETURN_IF_ERROR(
        stream.CopyAsync(&latch, batch[i].state + batch[i].layout->latch, sizeof(latch)));
    CKV_RETURN_IF_ERROR(stream.Synchronize());
    item.result.cut = latch.cut;
    if (work.request.want_selection) {
      CKV_ASSIGN_OR_RETURN(item.result.selected,
                           gpu::ReadSelection(stream, batch[i], layer, work.budget_tokens));
    }
    if (!work.request.want_output) continue;
    const float* item_out = out.data() + i * out_floats;
    const float* item_lse = lse.data() + i * shape.q_heads;
    if (item.output != nullptr) {
      std::memcpy(item.output, item_out, out_floats * sizeof(float));
      std::memcpy(item.output + out_floats * sizeof(float), item_lse,
                  shape.q_heads * sizeof(float));
    } else {
      item.result.output.assign(item_out, item_out + out_floats);
      item.result.lse.assign(item_lse, item_lse + shape.q_heads);
    }
  }
  return absl::OkStatus();
}

void ServiceCore::FinishServe(std::shared_ptr<ServeWork> work, absl::Status status) {
  std::vector<FetchResult> results;
  std::vector<Sequence*> sequences;
  std::vector<std::string> failures;
  for (ServeWork::Item& item : work->items) {
    Sequence& sequence = *item.sequence;
    --sequence.in_flight;
    sequence.step.in_flight = false;
    sequences.push_back(&sequence);
    if (const absl::Status& why = status.ok() ? item.failure : status; !why.ok()) {
      Fail(sequence, why);
      failures.emplace_back(why.message());
      continue;
    }
    FoldCounters(sequence, item.all_counters);
    results.push_back(std::move(item.result));
    if (sequence.releasing || !sequence.failure.ok() || item.repeated) continue;
    const uint32_t before = sequence.arrived();
    LayerProgress& layer = sequence.layers[work->request.layer];
    layer.arrived = layer.accepted;
    counters_.ingested_tokens += sequence.arrived() - before;
    SubmitReady(sequence);
  }
  PublishStatus();
  if (status.ok() && !failures.empty()) {
    status = absl::InternalError(
        fmt::format("{} of {} sequences have failed, the step of the others can be repeated: {}",
                    failures.size(), work->items.size(), fmt::join(failures, "; ")));
  }
  if (status.ok()) {
    work->done(std::move(results));
  } else {
    work->done(status);
  }
  for (Sequence* sequence : sequences) {
    if (sequence->releasing) MaybeFinishRelease(*sequence);
  }
}

}  // namespace clusterkv::service
