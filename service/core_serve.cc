// Served fetch: one layer of a decode step, on the daemon's device, for an RPC.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "gpu/cluster_ops.h"
#include "gpu/decode_ops.h"
#include "gpu/selection.h"
#include "gpu/status_macros.h"
#include "service/core.h"
#include "service/serve_tensors.h"

namespace clusterkv::service {
namespace {

constexpr size_t kMaxItems = 256;

// Of one call in so many the device's phases are timed: it waits for the device between them.
constexpr uint64_t kTimedCalls = 64;

std::optional<SequenceId> FindTwice(const std::vector<FetchItem>& items) {
  std::vector<SequenceId> ids;
  ids.reserve(items.size());
  for (const FetchItem& item : items) ids.push_back(item.sequence);
  std::ranges::sort(ids);
  const auto twice = std::ranges::adjacent_find(ids);
  return twice == ids.end() ? std::nullopt : std::optional(*twice);
}

}  // namespace

// Lives from admission to the reply; the sequences stay while it is in flight.
struct ServiceCore::ServeWork {
  struct Item {
    Sequence* sequence = nullptr;
    bool repeated = false;
    std::vector<std::byte*> staged;  // [kv_heads], where this token goes; empty: nowhere
    // Nobody else counts on a served sequence, so what was folded last is what the step begins
    // with.
    gpu::LayerCounters before{}, after{};
    FetchResult result;
    absl::Status failure;  // of this sequence alone
  };
  SessionId session = 0;
  FetchRequest request;  // owns the inline bytes
  uint32_t budget_tokens = 0;
  std::vector<Item> items;
  std::vector<ServePlace> places;  // of the items
  Completion<std::vector<FetchResult>> done;

  OperationTrace trace;
  bool timed = false;
  double queue_seconds = 0, finish_seconds = 0;
  double prepare_seconds = 0, gather_seconds = 0, attend_seconds = 0;  // if timed
};

void ServiceCore::FetchClusters(SessionKey key, FetchRequest request,
                                Completion<std::vector<FetchResult>> done) {
  OperationTrace trace(key.request_id);
  Call<std::vector<FetchResult>>(
      std::move(done),
      [this, key = std::move(key), request = std::move(request),
       trace = std::move(trace)](Completion<std::vector<FetchResult>> reply) mutable {
        auto session = FindSession(key);
        if (!session.ok()) return reply(session.status());
        DoFetch(**session, std::move(request), trace, std::move(reply));
      });
}

void ServiceCore::DoFetch(Session& session, FetchRequest request, const OperationTrace& trace,
                          Completion<std::vector<FetchResult>> done) {
  if (request.items.empty() || request.items.size() > kMaxItems) {
    return done(absl::InvalidArgumentError(
        fmt::format("{} items, allowed are 1 to {}", request.items.size(), kMaxItems)));
  }
  auto work = std::make_shared<ServeWork>();
  work->session = session.id;
  work->request = std::move(request);
  work->items.reserve(work->request.items.size());
  work->places.reserve(work->request.items.size());
  if (const auto twice = FindTwice(work->request.items)) {
    return done(absl::InvalidArgumentError(fmt::format("sequence {} is there twice", *twice)));
  }
  for (const FetchItem& item : work->request.items) {
    if (absl::Status bad = PrepareItem(session, work->request, item, *work); !bad.ok()) {
      return done(bad);
    }
  }
  // Memory for the tokens, all or nothing.
  const uint32_t layer = work->request.layer;
  std::vector<PieceTable::Admission> admissions;
  admissions.reserve(work->items.size());
  for (const ServeWork::Item& item : work->items) {
    PieceTable& pieces = item.sequence->pieces;
    const uint32_t end = item.sequence->layers[layer].accepted + 1;
    if (item.repeated || pieces.Covers(layer, end)) {
      admissions.emplace_back();
      continue;
    }
    auto admission = pieces.Plan(layer, 1, end, false);
    if (!admission.ok()) {
      for (size_t i = 0; i < admissions.size(); ++i) {
        work->items[i].sequence->pieces.Discard(admissions[i]);
      }
      CountRefused(Limit::kHostMemory);
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
    sequence.pieces.Commit(std::move(admissions[i]), layer, position, position + 1, nullptr);
    if (position >= sequence.method.sink_tokens) {
      item.staged.reserve(sequence.request.shape.kv_heads);
      sequence.pieces.AppendPlaces(layer, position, item.staged);
    }
    sequence.layers[layer].accepted = position + 1;
    sequence.step.started = true;
    sequence.step.position = position;
    sequence.step.next_layer = layer + 1;
  }
  work->done = std::move(done);
  work->trace = trace;
  work->queue_seconds = work->trace.End("core_queue_ms");
  work->timed = served_calls_++ % kTimedCalls == 0;
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
                           const char* name) -> absl::StatusOr<ServePlace::Input> {
    const size_t given = place.arena == 0 ? place.inline_bytes.size() : place.bytes;
    if (given != bytes) {
      return refuse(absl::StatusCode::kInvalidArgument,
                    fmt::format("{} has {} bytes, not {}", name, given, bytes));
    }
    if (place.arena == 0) {
      return ServePlace::Input{reinterpret_cast<const std::byte*>(place.inline_bytes.data()),
                               false};
    }
    CKV_ASSIGN_OR_RETURN(const std::byte* const data,
                         ArenaBytes(session, place.arena, place.offset, place.bytes));
    return ServePlace::Input{data, true};
  };
  ServePlace where;
  CKV_ASSIGN_OR_RETURN(where.q, resolve(item.q, shape.q_heads * row, "q"));
  CKV_ASSIGN_OR_RETURN(where.k, resolve(item.k, shape.kv_heads * row, "k"));
  CKV_ASSIGN_OR_RETURN(where.v, resolve(item.v, shape.kv_heads * row, "v"));
  if (item.output) {
    CKV_ASSIGN_OR_RETURN(
        const ServePlace::Input output,
        resolve(*item.output, shape.q_heads * (shape.head_dim + 1) * sizeof(float), "output"));
    where.output = const_cast<std::byte*>(output.data);
  }
  added.before = sequence->counters[request.layer];
  added.result.sequence = item.sequence;
  work.items.push_back(std::move(added));
  work.places.push_back(where);
  return absl::OkStatus();
}

// The step's tokens of all items that need it into the host store: neighbours in one operation.
absl::Status ServiceCore::StageServed(const ServeWork& work, const ServeTensors& tensors) {
  const gpu::Shape& shape = work.items.front().sequence->request.shape;
  const auto staged = [&](size_t i) { return !work.items[i].staged.empty(); };
  for (size_t begin = 0; begin < work.items.size();) {
    if (!staged(begin)) {
      ++begin;
      continue;
    }
    // Item after item, as layers of a range of one token.
    gpu::StageArgs stage{.range = tensors.token(begin),
                         .layer_stride = tensors.token_stride(),
                         .range_tokens = 1,
                         .first_token = 0,
                         .count = 1,
                         .layer_count = 0,
                         .kv_heads = shape.kv_heads,
                         .head_dim = shape.head_dim,
                         .dtype = shape.dtype,
                         .destinations = {}};
    for (; begin < work.items.size() && staged(begin); ++begin, ++stage.layer_count) {
      const std::vector<std::byte*>& places = work.items[begin].staged;
      stage.destinations.insert(stage.destinations.end(), places.begin(), places.end());
    }
    CKV_RETURN_IF_ERROR(device_->cluster_ops().Stage(*serve_stream_, std::move(stage)));
  }
  return absl::OkStatus();
}

absl::Status ServiceCore::EnqueueServe(ServeWork& work, gpu::Batch batch, gpu::Batch beginning) {
  const gpu::Shape& shape = work.items.front().sequence->request.shape;
  const uint32_t layer = work.request.layer;
  gpu::DecodeOps& ops = device_->decode_ops();
  gpu::Stream& stream = *serve_stream_;
  ServeTensors& tensors = *serve_tensors_;
  const auto end_phase = [&](const char* name, double& seconds) -> absl::Status {
    absl::Status finished = stream.Synchronize();
    seconds = work.trace.End(name);
    return finished;
  };
  CKV_RETURN_IF_ERROR(tensors.Prepare(stream, shape, work.places));
  if (!beginning.empty()) CKV_RETURN_IF_ERROR(ops.BeginStep(stream, beginning));
  CKV_RETURN_IF_ERROR(ops.Append(stream, batch, layer, tensors.tokens()));
  if (work.timed) {
    CKV_RETURN_IF_ERROR(ops.Select(stream, batch, layer, tensors.queries(), work.budget_tokens));
    CKV_RETURN_IF_ERROR(end_phase("prepare_ms", work.prepare_seconds));
    CKV_RETURN_IF_ERROR(ops.Fetch(stream, batch, layer));
    CKV_RETURN_IF_ERROR(end_phase("gather_ms", work.gather_seconds));
    CKV_RETURN_IF_ERROR(ops.Attend(stream, batch, layer, tensors.queries(), tensors.target()));
  } else {
    CKV_RETURN_IF_ERROR(ops.DecodeLayer(stream, batch, layer, tensors.queries(), work.budget_tokens,
                                        tensors.target()));
  }
  if (work.request.want_output) {
    CKV_RETURN_IF_ERROR(tensors.ReturnOutputs(stream, work.places));
  }
  // While the device is at the layer.
  CKV_RETURN_IF_ERROR(StageServed(work, tensors));
  CKV_RETURN_IF_ERROR(
      ops.ReportLayer(stream, batch, layer, {tensors.reports().data(), tensors.reports().size()}));
  if (work.timed) return end_phase("attend_ms", work.attend_seconds);
  work.trace.End("enqueue_ms");
  return absl::OkStatus();
}

absl::Status ServiceCore::RunServe(ServeWork& work) {
  work.queue_seconds += work.trace.End("serve_queue_ms");
  std::vector<gpu::BatchSlot> batch, beginning;
  for (const ServeWork::Item& item : work.items) {
    batch.push_back(item.sequence->slot());
    if (work.request.layer == 0 && !item.repeated) beginning.push_back(batch.back());
  }
  const absl::Status status = EnqueueServe(work, batch, beginning);
  const absl::Status finished = serve_stream_->Synchronize();
  if (!work.timed) work.trace.End("device_ms");
  CKV_RETURN_IF_ERROR(status);
  CKV_RETURN_IF_ERROR(finished);
  for (size_t i = 0; i < work.items.size(); ++i) {
    CKV_RETURN_IF_ERROR(TakeServed(work, i, batch[i]));
  }
  work.trace.End("results_ms");
  return absl::OkStatus();
}

// What the device left of one item becomes its result.
absl::Status ServiceCore::TakeServed(ServeWork& work, size_t index, const gpu::BatchSlot& slot) {
  ServeWork::Item& item = work.items[index];
  const ServeTensors& tensors = *serve_tensors_;
  const gpu::LayerReport& report = tensors.reports()[index];
  if (report.errors != 0) {
    item.failure = absl::InternalError(
        fmt::format("sequence {}: step error bits {}", item.result.sequence, report.errors));
    return absl::OkStatus();
  }
  item.after = report.counters;
  item.result.cut = report.cut;
  item.result.hit_clusters =
      static_cast<uint32_t>(item.after.hit_clusters - item.before.hit_clusters);
  item.result.missed_clusters =
      static_cast<uint32_t>(item.after.missed_clusters - item.before.missed_clusters);
  item.result.hit_tokens = item.after.hit_tokens - item.before.hit_tokens;
  item.result.missed_tokens = item.after.missed_tokens - item.before.missed_tokens;
  item.result.gathered_bytes = item.after.gathered_bytes - item.before.gathered_bytes;
  if (work.request.want_selection) {
    CKV_ASSIGN_OR_RETURN(
        item.result.selected,
        gpu::ReadSelection(*serve_stream_, slot, work.request.layer, work.budget_tokens));
  }
  if (!work.request.want_output || work.places[index].output != nullptr) return absl::OkStatus();
  const gpu::Shape& shape = item.sequence->request.shape;
  const float* const out = tensors.output(index);
  item.result.output.assign(out, out + size_t{shape.q_heads} * shape.head_dim);
  item.result.lse.assign(tensors.lse(index), tensors.lse(index) + shape.q_heads);
  return absl::OkStatus();
}

void ServiceCore::CountServed(const ServeWork& work, uint64_t gathered_bytes) {
  FetchStatus& fetch = counters_.fetch;
  const auto phase = [&](FetchPhase which) -> Mean& {
    return fetch.phases[static_cast<size_t>(which)];
  };
  fetch.sequences += work.items.size();
  fetch.call.Observe(work.trace.seconds());
  phase(FetchPhase::kQueue).Observe(work.queue_seconds);
  phase(FetchPhase::kFinish).Observe(work.finish_seconds);
  if (!work.timed) return;
  phase(FetchPhase::kPrepare).Observe(work.prepare_seconds);
  phase(FetchPhase::kGather).Observe(work.gather_seconds);
  phase(FetchPhase::kAttend).Observe(work.attend_seconds);
  counters_.h2d.bytes += gathered_bytes;
  counters_.h2d.seconds += work.gather_seconds;
}

void ServiceCore::FinishServe(const std::shared_ptr<ServeWork>& work, absl::Status status) {
  std::vector<FetchResult> results;
  std::vector<Sequence*> sequences;
  std::vector<std::string> failures;
  uint64_t gathered_bytes = 0;
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
    FoldCounters(sequence, work->request.layer, item.after);
    gathered_bytes += item.result.gathered_bytes;
    results.push_back(std::move(item.result));
    if (!item.repeated) {
      const gpu::Shape& shape = sequence.request.shape;
      counters_.ingest.bytes += uint64_t{shape.kv_heads} * shape.row_bytes();
    }
    if (sequence.releasing || !sequence.failure.ok() || item.repeated) continue;
    const uint32_t before = sequence.arrived();
    LayerProgress& layer = sequence.layers[work->request.layer];
    layer.arrived = layer.accepted;
    counters_.ingested_tokens += sequence.arrived() - before;
    SubmitReady(sequence);
  }
  work->finish_seconds = work->trace.End("core_return_ms");
  slow_log_.Report(SlowLog::kFetchClusters, work->trace,
                   {{"session", work->session},
                    {"sequence", work->items.front().sequence->id},
                    {"sequences", work->items.size()},
                    {"layer", work->request.layer}});
  if (status.ok()) CountServed(*work, gathered_bytes);
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
