// Ingest, clustering, publishing.
//
//   IngestTokens ─check, take memory─► stage thread: ring ─► host rows ─► credit, arrived
//     ─► segments that are complete ─► ClusterScheduler ─► all layers done ─► publish ─► waiters
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "gpu/cluster_ops.h"
#include "gpu/decode_ops.h"
#include "gpu/segment_plan.h"
#include "gpu/status_macros.h"
#include "service/core.h"
#include "service/logging.h"

namespace clusterkv::service {
namespace {

constexpr size_t kMaxRangesInFlight = 4096;
constexpr size_t kMaxWaitersPerSession = 4096;
constexpr uint64_t kOffsetUnit = 16;  // of ClusterEntry and SegmentRun

// One stream of random numbers for each problem, whatever batch it is in.
uint64_t ProblemSeed(uint64_t seed, uint32_t ordinal, uint32_t layer, uint32_t head) {
  uint64_t x = seed + 0x9e3779b97f4a7c15ull * (1 + ordinal);
  for (const uint64_t part : {uint64_t{layer}, uint64_t{head}}) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull + part;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  }
  return x ^ (x >> 31);
}

uint64_t RangeBytes(const gpu::Shape& shape, const IngestRequest& request) {
  return uint64_t{request.layer_count} * request.count * shape.kv_heads * shape.row_bytes();
}

}  // namespace

// Everything that a piece of staging touches; the sequence stays while it is in flight.
struct ServiceCore::StageWork {
  Sequence* sequence = nullptr;
  IngestRequest request;
  const std::byte* range = nullptr;
  std::vector<std::vector<RowSpan>> spans;  // per (layer, head), the same cuts in each
  std::vector<RowCopy> moves;
  uint32_t length_after = 0;  // served: sets the length, 0 leaves it
  uint64_t bytes = 0;         // of the range
  absl::Time admitted;
  double seconds = 0;  // that staging took
  OperationTrace trace;
};

void ServiceCore::IngestTokens(SessionKey key, IngestRequest request, Completion<uint32_t> done) {
  OperationTrace trace(key.request_id);
  Call<uint32_t>(std::move(done), [this, key = std::move(key), request,
                                   trace = std::move(trace)](const Completion<uint32_t>& reply) {
    auto session = FindSession(key);
    if (!session.ok()) return reply(session.status());
    DoIngest(**session, request, trace, reply);
  });
}

absl::Status ServiceCore::CheckIngest(const Sequence& sequence,
                                      const IngestRequest& request) const {
  const gpu::Shape& shape = sequence.request.shape;
  if (request.count == 0) return absl::InvalidArgumentError("count is 0");
  if (request.layer_count == 0 || request.layer_begin >= shape.layers ||
      request.layer_count > shape.layers - request.layer_begin) {
    return absl::InvalidArgumentError(fmt::format("layers {} + {} are not in a sequence of {}",
                                                  request.layer_begin, request.layer_count,
                                                  shape.layers));
  }
  if (sequence.last_range && request.idempotency_key <= sequence.last_range->idempotency_key) {
    return absl::InvalidArgumentError(fmt::format("idempotency_key {} does not rise above {}",
                                                  request.idempotency_key,
                                                  sequence.last_range->idempotency_key));
  }
  if (request.idempotency_key == 0) return absl::InvalidArgumentError("idempotency_key is 0");
  const uint64_t end = uint64_t{request.position} + request.count;
  if (end > sequence.request.max_tokens) {
    return absl::OutOfRangeError(fmt::format("tokens {} + {} are beyond max_tokens {}",
                                             request.position, request.count,
                                             sequence.request.max_tokens));
  }
  const bool all_ended = std::ranges::all_of(sequence.layers, &LayerProgress::prompt_ended);
  for (uint32_t i = 0; i < request.layer_count; ++i) {
    const uint32_t layer_index = request.layer_begin + i;
    const LayerProgress& layer = sequence.layers[layer_index];
    if (layer.accepted != request.position) {
      return absl::FailedPreconditionError(fmt::format(
          "layer {} expects position {}, not {}", layer_index, layer.accepted, request.position));
    }
    if (layer.prompt_ended && (request.end_of_prompt || sequence.served() || !all_ended)) {
      return absl::FailedPreconditionError(
          fmt::format("the prompt of layer {} has ended at {}{}", layer_index,
                      *sequence.prompt_tokens, all_ended ? "" : ", in other layers not yet"));
    }
    if (!layer.prompt_ended && sequence.prompt_tokens &&
        (end > *sequence.prompt_tokens ||
         request.end_of_prompt != (end == *sequence.prompt_tokens))) {
      return absl::FailedPreconditionError(fmt::format(
          "tokens up to {} with end_of_prompt {}, but the prompt has {} in other layers", end,
          request.end_of_prompt, *sequence.prompt_tokens));
    }
  }
  const gpu::RangeKind kind = all_ended               ? gpu::RangeKind::kDecoded
                              : request.end_of_prompt ? gpu::RangeKind::kPromptEnd
                                                      : gpu::RangeKind::kPrompt;
  const uint64_t segments = uint64_t{request.layer_count} * shape.kv_heads *
                            gpu::SegmentsOfRange(sequence.method, kind, request.count);
  if (segments > gpu::kMaxSegmentsOfRange) {
    return absl::InvalidArgumentError(fmt::format(
        "{} tokens of {} layers begin up to {} segments of a (layer, KV head), at most {} may "
        "begin "
        "in one range: hand over fewer tokens or layers at a time, or use longer segments",
        request.count, request.layer_count, segments, gpu::kMaxSegmentsOfRange));
  }
  const uint32_t furthest =
      std::ranges::max_element(sequence.layers, {}, &LayerProgress::accepted)->accepted;
  if (request.end_of_prompt && end < furthest) {
    return absl::FailedPreconditionError(
        fmt::format("end_of_prompt at {}, but another layer has {} tokens already", end, furthest));
  }
  return absl::OkStatus();
}

void ServiceCore::DoIngest(Session& session, const IngestRequest& request,
                           const OperationTrace& trace, const Completion<uint32_t>& done) {
  auto found = FindSequence(session, request.sequence);
  if (!found.ok()) return done(found.status());
  Sequence& sequence = **found;
  if (sequence.last_range && *sequence.last_range == request) return done(sequence.arrived());
  if (absl::Status bad = CheckIngest(sequence, request); !bad.ok()) return done(bad);
  const uint64_t bytes = RangeBytes(sequence.request.shape, request);
  auto range = ArenaBytes(session, request.arena, request.ring_offset, bytes);
  if (!range.ok()) return done(range.status());
  if (session.ranges.size() >= kMaxRangesInFlight) {
    CountRefused(Limit::kRingCredits);
    return done(absl::ResourceExhaustedError(
        fmt::format("{} ranges are in flight, the most there may be", session.ranges.size())));
  }
  if (!session.ranges.Acquire(request.arena, request.ring_offset, bytes)) {
    CountRefused(Limit::kRingCredits);
    return done(absl::ResourceExhaustedError(
        fmt::format("beyond the credits: {} bytes at offset {} of arena {} touch a range that has "
                    "not come back",
                    bytes, request.ring_offset, request.arena)));
  }
  const uint32_t end = request.position + request.count;
  auto admission =
      sequence.pieces.Plan(request.layer_begin, request.layer_count, end, request.end_of_prompt);
  if (!admission.ok()) {
    session.ranges.Release(request.arena, request.ring_offset);
    CountRefused(Limit::kHostMemory);
    return done(admission.status());
  }
  Arena& arena = session.arenas.at(request.arena);
  if (!std::exchange(arena.ring, true)) session.ring_bytes += arena.bytes;

  auto work = std::make_shared<StageWork>();
  work->sequence = &sequence;
  work->request = request;
  work->range = *range;
  work->admitted = options_.now();
  work->moves = std::move(admission->moves);
  work->bytes = bytes;
  work->trace = trace;
  work->trace.End("core_queue_ms");
  sequence.pieces.Commit(*std::move(admission), request.layer_begin,
                         std::max(request.position, sequence.method.sink_tokens), end,
                         &work->spans);
  for (uint32_t i = 0; i < request.layer_count; ++i) {
    LayerProgress& layer = sequence.layers[request.layer_begin + i];
    layer.accepted = end;
    layer.prompt_ended |= request.end_of_prompt;
  }
  if (request.end_of_prompt) sequence.prompt_tokens = end;
  if (std::ranges::all_of(sequence.layers, &LayerProgress::prompt_ended)) work->length_after = end;
  sequence.last_range = request;
  ++sequence.in_flight;
  stage_.Post([this, work, session_id = session.id] {
    const absl::Status status = RunStage(*work);
    core_.Post([this, work, session_id, status] { FinishStage(session_id, *work, status); });
  });
  done(sequence.arrived());
}

absl::Status ServiceCore::RunStage(StageWork& work) {
  work.trace.End("stage_queue_ms");
  const Sequence& sequence = *work.sequence;
  const gpu::Shape& shape = sequence.request.shape;
  const IngestRequest& request = work.request;
  const auto enqueue = [&]() -> absl::Status {
    for (size_t cut = 0; cut < work.spans.front().size(); ++cut) {
      gpu::StageArgs args{.range = work.range,
                          .range_tokens = request.count,
                          .first_token = work.spans.front()[cut].position - request.position,
                          .count = work.spans.front()[cut].tokens,
                          .layer_count = request.layer_count,
                          .kv_heads = shape.kv_heads,
                          .head_dim = shape.head_dim,
                          .dtype = shape.dtype,
                          .destinations = {}};
      for (const auto& spans : work.spans) args.destinations.push_back(spans[cut].data);
      CKV_RETURN_IF_ERROR(device_->cluster_ops().Stage(*stage_stream_, std::move(args)));
    }
    for (const RowCopy& move : work.moves) {
      CKV_RETURN_IF_ERROR(stage_stream_->CopyAsync(move.destination, move.source, move.bytes));
    }
    if (!sequence.served()) return absl::OkStatus();
    const size_t row = shape.head_dim * gpu::SizeOf(shape.dtype);
    const size_t plane = size_t{request.count} * shape.kv_heads * row;
    return device_->decode_ops().WriteTokens(*stage_stream_,
                                             {.slot = sequence.slot(),
                                              .layer_begin = request.layer_begin,
                                              .layer_count = request.layer_count,
                                              .position = request.position,
                                              .count = request.count,
                                              .source = {.k = work.range,
                                                         .v = work.range + plane,
                                                         .layer_stride = 2 * plane,
                                                         .token_stride = shape.kv_heads * row,
                                                         .head_stride = row},
                                              .length_after = work.length_after});
  };
  const absl::Status status = enqueue();
  work.seconds = work.trace.End("enqueue_ms");
  const absl::Status finished = stage_stream_->Synchronize();
  work.seconds += work.trace.End("device_ms");
  return status.ok() ? finished : status;
}

void ServiceCore::FinishStage(SessionId session_id, StageWork& work, const absl::Status& status) {
  const IngestRequest& request = work.request;
  Sequence& sequence = *SequenceById(session_id, request.sequence);  // stays: work is in flight
  Session& session = sequence.session;
  work.trace.End("core_return_ms");
  slow_log_.Report(SlowLog::kIngestTokens, work.trace,
                   {{"session", session_id},
                    {"sequence", sequence.id},
                    {"position", request.position},
                    {"tokens", request.count},
                    {"layers", request.layer_count}});
  --sequence.in_flight;
  session.ranges.Release(request.arena, request.ring_offset);
  if (session.sink) session.sink->CreditReturned(request.arena, request.ring_offset, work.bytes);
  counters_.ingest.range.Observe(absl::ToDoubleSeconds(options_.now() - work.admitted));
  if (status.ok()) {
    counters_.ingest.bytes += work.bytes;
    counters_.d2h.bytes += work.bytes;
    counters_.d2h.seconds += work.seconds;
  } else {
    Fail(sequence, status);
  }
  if (sequence.releasing || !sequence.failure.ok()) return MaybeFinishRelease(sequence);
  const uint32_t before = sequence.arrived();
  for (uint32_t i = 0; i < request.layer_count; ++i) {
    sequence.layers[request.layer_begin + i].arrived = request.position + request.count;
    if (request.end_of_prompt) sequence.pieces.FinishPromptEnd(request.layer_begin + i);
  }
  counters_.ingested_tokens += sequence.arrived() - before;
  RecycleReturned(session);
  SubmitReady(sequence);
  NotifyWaiters(sequence);
  PublishStatus();
}

void ServiceCore::SubmitReady(Sequence& sequence) {
  for (uint32_t layer = 0; layer < sequence.layers.size(); ++layer) {
    LayerProgress& progress = sequence.layers[layer];
    const bool ended = progress.prompt_ended && progress.arrived >= *sequence.prompt_tokens;
    while (auto segment = progress.plan.Next(progress.arrived,
                                             ended ? sequence.prompt_tokens : std::nullopt)) {
      SubmitLayer(sequence, layer, *segment);
      progress.plan.Advance(*segment);
      ++progress.next_segment;
    }
  }
}

void ServiceCore::SubmitLayer(Sequence& sequence, uint32_t layer, const gpu::Segment& segment) {
  const uint32_t ordinal = sequence.layers[layer].next_segment;
  const size_t index = ordinal - sequence.published_segments;
  if (index == sequence.pending.size()) {
    sequence.pending.push_back({.segment = segment,
                                .complete = options_.now(),
                                .layers = std::vector<ClusterResult>(sequence.layers.size())});
    ++counters_.clustering.pending_segments;
  }
  const gpu::Shape& shape = sequence.request.shape;
  const Piece& piece = sequence.pieces.piece(layer, ordinal);
  ClusterJob job{.tokens = segment.tokens(),
                 .first_position = segment.begin,
                 .clusters = gpu::ClustersOfSegment(sequence.method, segment.tokens()),
                 .max_clusters = gpu::MaxClustersOfSegment(sequence.method, segment.tokens()),
                 .head_dim = shape.head_dim,
                 .dtype = shape.dtype,
                 .iterations = sequence.method.kmeans_iterations,
                 .largest_cluster_tokens = sequence.method.largest_cluster_tokens(),
                 .center_keys = sequence.method.center_keys,
                 .heads = {},
                 .done = {}};
  for (uint32_t head = 0; head < shape.kv_heads; ++head) {
    job.heads.push_back(
        {.rows = sequence.pieces.rows(piece, head),
         .positions = reinterpret_cast<uint32_t*>(sequence.pieces.positions(piece, head)),
         .seed = ProblemSeed(sequence.method.seed, ordinal, layer, head)});
  }
  job.done = [this, session = sequence.session.id, id = sequence.id, ordinal,
              layer](absl::StatusOr<ClusterResult> result) {
    auto held = std::make_shared<absl::StatusOr<ClusterResult>>(std::move(result));
    core_.Post([this, session, id, ordinal, layer, held] {
      FinishCluster(session, id, ordinal, layer, std::move(*held));
    });
  };
  ++sequence.in_flight;
  scheduler_->Submit(std::move(job));
}

void ServiceCore::FinishCluster(SessionId session_id, SequenceId sequence_id, uint32_t ordinal,
                                uint32_t layer, absl::StatusOr<ClusterResult> result) {
  Sequence& sequence = *SequenceById(session_id, sequence_id);
  --sequence.in_flight;
  PendingSegment& pending = sequence.pending[ordinal - sequence.published_segments];
  if (result.ok()) {
    CountClustered(sequence, pending.segment.tokens(), *result);
  } else {
    Fail(sequence, result.status());
  }
  if (sequence.releasing || !sequence.failure.ok()) return MaybeFinishRelease(sequence);
  pending.layers[layer] = *std::move(result);
  ++pending.layers_done;
  MaybePublish(sequence);
}

void ServiceCore::CountClustered(const Sequence& sequence, uint32_t tokens,
                                 const ClusterResult& result) {
  const uint64_t problems = result.heads.size();
  counters_.clustering.problems += problems;
  counters_.clustering.tokens += problems * tokens;
  counters_.clustering.seconds += result.seconds;
  for (const HeadClusters& head : result.heads) {
    counters_.clustering.clusters += head.count;
    counters_.clustering.iterations += head.iterations;
  }
  counters_.d2h.bytes += problems * tokens * sequence.layout.row_bytes();
  counters_.d2h.seconds += result.permute_seconds;
}

void ServiceCore::MaybePublish(Sequence& sequence) {
  if (sequence.publishing || sequence.pending.empty() || sequence.releasing ||
      !sequence.failure.ok()) {
    return;
  }
  const PendingSegment& pending = sequence.pending.front();
  const gpu::Shape& shape = sequence.request.shape;
  if (pending.layers_done < shape.layers) return;
  gpu::PublishArgs args{.state = sequence.state->data(),
                        .layout = &sequence.layout,
                        .segment = sequence.published_segments,
                        .segment_begin = pending.segment.begin,
                        .segment_end = pending.segment.end,
                        .problems = {}};
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    const Piece& piece = sequence.pieces.piece(layer, sequence.published_segments);
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      const Extent& extent = piece.heads[head];
      // A direct fetch reads the chunk through the worker's own mapping.
      if (!sequence.served() && !sequence.session.memory->mapped(extent.chunk)) return;
      const HeadClusters& clusters = pending.layers[layer].heads[head];
      args.problems.push_back(
          {.cluster_begin = sequence.published_clusters[args.problems.size()],
           .cluster_count = clusters.count,
           .sizes = clusters.sizes,
           .centroids = clusters.centroids,
           .value_means = clusters.value_means,
           .chunk = extent.chunk,
           .rows_offset = static_cast<uint32_t>((extent.offset + piece.rows_offset) / kOffsetUnit),
           .positions_offset = static_cast<uint32_t>(extent.offset / kOffsetUnit)});
    }
  }
  sequence.publishing = true;
  ++sequence.in_flight;
  scheduler_->Publish(std::move(args), [this, session = sequence.session.id,
                                        id = sequence.id](const absl::Status& status) {
    core_.Post([this, session, id, status] { FinishPublish(session, id, status); });
  });
}

void ServiceCore::FinishPublish(SessionId session_id, SequenceId sequence_id,
                                const absl::Status& status) {
  Sequence& sequence = *SequenceById(session_id, sequence_id);
  --sequence.in_flight;
  sequence.publishing = false;
  if (!status.ok()) Fail(sequence, status);
  if (sequence.releasing || !sequence.failure.ok()) return MaybeFinishRelease(sequence);
  const PendingSegment published = std::move(sequence.pending.front());
  sequence.pending.pop_front();
  --counters_.clustering.pending_segments;
  counters_.clustering.publish.Observe(absl::ToDoubleSeconds(options_.now() - published.complete));
  size_t problem = 0;
  for (const ClusterResult& layer : published.layers) {
    for (const HeadClusters& head : layer.heads) {
      sequence.published_clusters[problem++] += head.count;
    }
  }
  ++sequence.published_segments;
  sequence.cut = published.segment.end;
  sequence.segment_ends.push_back(sequence.cut);
  ++counters_.published_segments;
  counters_.clustered_tokens += published.segment.tokens();
  const PublishedInfo info{.segments = sequence.published_segments, .cut = sequence.cut};
  if (sequence.session.sink) sequence.session.sink->SegmentPublished(sequence.id, info);
  PublishStatus();
  NotifyWaiters(sequence);
  MaybePublish(sequence);
}

uint64_t ServiceCore::WaitPublished(SessionKey key, SequenceId id, uint32_t length,
                                    Completion<PublishedInfo> done) {
  const uint64_t waiter_id = next_waiter_++;
  Call<PublishedInfo>(std::move(done), [this, key = std::move(key), id, length,
                                        waiter_id](Completion<PublishedInfo> reply) {
    auto session = FindSession(key);
    if (!session.ok()) return reply(session.status());
    auto sequence = FindSequence(**session, id);
    if (!sequence.ok()) return reply(sequence.status());
    DoWait(**session, **sequence, {.id = waiter_id, .length = length, .done = std::move(reply)});
  });
  return waiter_id;
}

void ServiceCore::DoWait(Session& session, Sequence& sequence, Waiter waiter) {
  if (waiter.length == 0) {
    if (!sequence.prompt_tokens) {
      return waiter.done(absl::FailedPreconditionError(
          fmt::format("sequence {}: length 0 asks for the prompt, whose end has not been ingested",
                      sequence.id)));
    }
    waiter.length = *sequence.prompt_tokens;
  }
  if (waiter.length > sequence.request.max_tokens) {
    return waiter.done(absl::OutOfRangeError(fmt::format(
        "length {} is beyond max_tokens {}", waiter.length, sequence.request.max_tokens)));
  }
  if (WaitIsOver(sequence, waiter.length)) {
    return waiter.done(PublishedInfo{sequence.published_segments, sequence.cut});
  }
  if (session.waiters >= kMaxWaitersPerSession) {
    CountRefused(Limit::kWaiters);
    return waiter.done(absl::ResourceExhaustedError(
        fmt::format("{} calls wait already, the most there may be", session.waiters)));
  }
  ++session.waiters;
  sequence.waiters.push_back(std::move(waiter));
}

// A prompt whose end is known has to have arrived, whatever of it is clustered: a served step may
// follow. Before the end is known its full segments are all that the rules allow.
bool ServiceCore::WaitIsOver(const Sequence& sequence, uint32_t length) const {
  const std::optional<uint32_t> prompt = sequence.prompt_tokens;
  if (prompt && length >= *prompt && !sequence.prompt_ended()) return false;
  return sequence.published_segments >= gpu::SegmentCount(sequence.method, prompt, length);
}

void ServiceCore::NotifyWaiters(Sequence& sequence) {
  const auto over = std::stable_partition(
      sequence.waiters.begin(), sequence.waiters.end(),
      [&](const Waiter& waiter) { return !WaitIsOver(sequence, waiter.length); });
  std::vector<Waiter> ready(std::make_move_iterator(over),
                            std::make_move_iterator(sequence.waiters.end()));
  sequence.waiters.erase(over, sequence.waiters.end());
  for (Waiter& waiter : ready) {
    --sequence.session.waiters;
    waiter.done(PublishedInfo{sequence.published_segments, sequence.cut});
  }
}

void ServiceCore::CancelWait(uint64_t waiter_id) {
  core_.Post([this, waiter_id] {
    for (auto& [session_id, session] : sessions_) {
      for (auto& [sequence_id, sequence] : session->sequences) {
        const auto found = std::ranges::find(sequence->waiters, waiter_id, &Waiter::id);
        if (found == sequence->waiters.end()) continue;
        Waiter waiter = std::move(*found);
        sequence->waiters.erase(found);
        --session->waiters;
        return waiter.done(absl::CancelledError("the caller has gone"));
      }
    }
  });
}

}  // namespace clusterkv::service
