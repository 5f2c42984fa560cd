// Registration, release, failure and accounting of sequences.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "gpu/cluster_ops.h"
#include "gpu/segment_plan.h"
#include "gpu/status_macros.h"
#include "service/core.h"
#include "service/logging.h"

namespace clusterkv::service {

Sequence::Sequence(Session& owner, SequenceId sequence_id, const RegisterRequest& registered,
                   const gpu::MethodOptions& resolved, const gpu::StateLayout& state_layout)
    : session(owner),
      id(sequence_id),
      request(registered),
      method(resolved),
      layout(state_layout),
      pieces(*owner.memory, registered.shape, resolved, registered.max_tokens),
      layers(registered.shape.layers, LayerProgress(resolved)),
      published_clusters(registered.shape.problems()),
      cut(resolved.sink_tokens),
      counters(registered.shape.layers),
      evicted_tokens(registered.shape.layers) {}

uint32_t Sequence::arrived() const {
  return std::ranges::min_element(layers, {}, &LayerProgress::arrived)->arrived;
}

bool Sequence::prompt_ended() const {
  return prompt_tokens.has_value() && std::ranges::all_of(layers, [&](const LayerProgress& layer) {
           return layer.prompt_ended && layer.arrived >= *prompt_tokens;
         });
}

gpu::BatchSlot Sequence::slot() const {
  return {.state = state->data(),
          .layout = &layout,
          .host_chunks = reinterpret_cast<const std::byte* const*>(session.chunk_table->data()),
          .chunk_count = session.chunk_count,
          .generation = generation,
          .active = 1};
}

void ServiceCore::RegisterSequence(SessionKey key, RegisterRequest request,
                                   Completion<RegisterReply> done) {
  Call<RegisterReply>(std::move(done),
                      [this, key = std::move(key), request](Completion<RegisterReply> reply) {
                        auto session = FindSession(key);
                        if (!session.ok()) return reply(session.status());
                        DoRegister(**session, request, std::move(reply));
                      });
}

void ServiceCore::DoRegister(Session& session, const RegisterRequest& request,
                             Completion<RegisterReply> done) {
  if (request.idempotency_key == 0) {
    return done(absl::InvalidArgumentError("idempotency_key is 0, it must not be"));
  }
  if (const auto known = session.idempotency.find(request.idempotency_key);
      known != session.idempotency.end()) {
    Sequence& sequence = *session.sequences.at(known->second);
    if (!(sequence.request == request)) {
      return done(absl::AlreadyExistsError(
          fmt::format("idempotency_key {} is sequence {} with other parameters",
                      request.idempotency_key, sequence.id)));
    }
    if (sequence.state == nullptr) return sequence.registering.push_back(std::move(done));
    return done(RegisterReply{.sequence = sequence.id,
                              .state_arena = sequence.state_arena,
                              .state_bytes = sequence.layout.total_bytes,
                              .generation = sequence.generation});
  }
  if (draining_) return done(absl::UnavailableError("the daemon is draining"));
  if (absl::Status bad = request.shape.Validate(); !bad.ok()) return done(bad);
  if (absl::Status bad = request.method.Validate(); !bad.ok()) return done(bad);
  const gpu::MethodOptions method = request.method.Resolved(request.shape);
  auto layout = gpu::StateLayout::Create(request.shape, method, request.max_tokens);
  if (!layout.ok()) return done(layout.status());
  if (request.reserve_tokens > request.max_tokens) {
    return done(absl::InvalidArgumentError(fmt::format(
        "reserve_tokens {} is above max_tokens {}", request.reserve_tokens, request.max_tokens)));
  }
  const uint64_t extent = PieceTable::LargestExtentBytes(request.shape, method, request.max_tokens);
  if (extent > pool_->chunk_bytes()) {
    return done(absl::InvalidArgumentError(
        fmt::format("a segment of one KV head takes {} bytes, a chunk holds {}: use a smaller "
                    "prompt_segment_tokens or a larger --host-chunk",
                    extent, pool_->chunk_bytes())));
  }
  // Of all layers or, at the prompt's end, of one layer, a token must fit into a range.
  const uint64_t segments = std::max<uint64_t>(
      request.shape.problems(),
      request.shape.kv_heads * gpu::SegmentsOfRange(method, gpu::RangeKind::kPromptEnd, 1));
  if (segments > gpu::kMaxSegmentsOfRange) {
    return done(absl::InvalidArgumentError(fmt::format(
        "{} layers of {} KV heads, with a window of {} tokens in decode segments of {}: a single "
        "token may begin {} segments of a (layer, KV head), at most {} may begin in one range",
        request.shape.layers, request.shape.kv_heads, method.min_window_tokens,
        method.decode_segment_tokens, segments, gpu::kMaxSegmentsOfRange)));
  }
  if (session.sequences.size() >= options_.max_sequences_per_session) {
    CountRefused(Limit::kSequences);
    return done(absl::ResourceExhaustedError(
        fmt::format("session {} has {} sequences, the most there may be", session.id,
                    session.sequences.size())));
  }
  KeptMemory taken{.memory = nullptr, .bytes = layout->total_bytes};
  absl::Status room = request.mode == FetchMode::kServed ? TakeGpuBytes(session, taken.bytes)
                                                         : TakeSharedBytes(session, taken);
  if (!room.ok()) return done(room);
  const double chunks = PieceTable::ChunksNeeded(
      request.shape, method,
      request.reserve_tokens > 0 ? request.reserve_tokens : request.max_tokens, request.max_tokens,
      pool_->chunk_bytes());
  if (absl::Status full = session.memory->AddReservation(chunks); !full.ok()) {
    FreeSharedMemory(std::move(taken.memory), session, taken.bytes);
    CountRefused(Limit::kHostMemory);
    return done(full);
  }
  auto sequence = std::make_unique<Sequence>(session, next_sequence_++, request, method, *layout);
  sequence->reserved_chunks = chunks;
  sequence->kept = std::move(taken.memory);
  sequence->gpu_bytes = taken.bytes;
  sequence->generation = next_generation_++;
  sequence->registering.push_back(std::move(done));
  Sequence& made = *sequence;
  CountRegistered(made);
  session.idempotency[request.idempotency_key] = made.id;
  session.sequences[made.id] = std::move(sequence);
  MakeState(made);
}

absl::Status ServiceCore::MakeStateMemory(const Sequence& sequence,
                                          std::unique_ptr<gpu::DeviceMemory>& memory) {
  if (!sequence.served()) return MakeShared(memory, sequence.layout.total_bytes);
  CKV_ASSIGN_OR_RETURN(memory, device_->Allocate(sequence.layout.total_bytes));
  return absl::OkStatus();
}

// On the memory thread: allocating and initialising takes milliseconds, and may wedge on a GPU.
void ServiceCore::MakeState(Sequence& sequence) {
  ++sequence.in_flight;
  const bool wants_table = sequence.served() && sequence.session.chunk_table == nullptr;
  auto memory = std::make_shared<std::unique_ptr<gpu::DeviceMemory>>(std::move(sequence.kept));
  memory_.Post([this, &sequence, wants_table, memory] {  // stays while work is in flight
    auto table = wants_table ? device_->AllocatePinned(kMaxSessionChunks * sizeof(std::byte*))
                             : absl::StatusOr<std::unique_ptr<gpu::DeviceMemory>>(nullptr);
    absl::Status status = MakeStateMemory(sequence, *memory);
    if (status.ok()) status = table.status();
    gpu::UniqueFd fd;
    if (status.ok()) {
      status = device_->cluster_ops().Initialize(*memory_stream_, (*memory)->data(),
                                                 sequence.layout, sequence.generation);
      const absl::Status finished = memory_stream_->Synchronize();
      if (status.ok()) status = finished;
    }
    if (status.ok() && !sequence.served()) {
      auto exported = (*memory)->Export();
      status = exported.status();
      if (status.ok()) fd = *std::move(exported);
    }
    auto chunk_table = std::make_shared<std::unique_ptr<gpu::DeviceMemory>>(
        table.ok() ? *std::move(table) : nullptr);
    auto descriptor = std::make_shared<gpu::UniqueFd>(std::move(fd));
    core_.Post([this, &sequence, status, memory, chunk_table, descriptor] {
      sequence.state = std::move(*memory);
      Session& session = sequence.session;
      if (*chunk_table != nullptr) session.TakeChunkTable(std::move(*chunk_table));
      if (status.ok() && !sequence.served() && session.attach != nullptr) {
        sequence.state_arena = session.next_arena++;
        session.attach->GrantArena(sequence.state_arena, sequence.layout.total_bytes,
                                   descriptor->get());
      }
      FinishRegister(sequence, status);
    });
  });
}

void ServiceCore::FinishRegister(Sequence& sequence, absl::Status status) {
  --sequence.in_flight;
  if (status.ok() && sequence.releasing) status = absl::UnavailableError("the session is over");
  const auto callers = std::exchange(sequence.registering, {});
  if (!status.ok()) {
    if (!sequence.releasing)
      Release(sequence);
    else
      MaybeFinishRelease(sequence);
    for (const auto& caller : callers) caller(status);
    return;
  }
  LogInfo("sequence registered", {{"session", sequence.session.id},
                                  {"sequence", sequence.id},
                                  {"mode", sequence.served() ? "served" : "direct"},
                                  {"max_tokens", sequence.request.max_tokens},
                                  {"state_bytes", sequence.layout.total_bytes}});
  PublishStatus();
  for (const auto& caller : callers) {
    caller(RegisterReply{.sequence = sequence.id,
                         .state_arena = sequence.state_arena,
                         .state_bytes = sequence.layout.total_bytes,
                         .generation = sequence.generation});
  }
}

void ServiceCore::ReleaseSequence(SessionKey key, SequenceId id, Completion<bool> done) {
  Call<bool>(std::move(done), [this, key = std::move(key), id](Completion<bool> reply) {
    auto session = FindSession(key);
    if (!session.ok()) return reply(session.status());
    const auto found = (*session)->sequences.find(id);
    if (found == (*session)->sequences.end() || found->second->releasing ||
        found->second->state == nullptr) {
      return reply(
          absl::NotFoundError(fmt::format("session {} has no sequence {}", (*session)->id, id)));
    }
    found->second->released.push_back(std::move(reply));
    Release(*found->second);
  });
}

// From here on no call finds the sequence; what is in flight on its memory drains first.
void ServiceCore::Release(Sequence& sequence) {
  sequence.releasing = true;
  sequence.session.idempotency.erase(sequence.request.idempotency_key);
  FailWaiters(sequence, absl::NotFoundError(fmt::format("sequence {} was released", sequence.id)));
  TakeSamples({&sequence});  // what was counted last must not be lost
  MaybeFinishRelease(sequence);
}

void ServiceCore::MaybeFinishRelease(Sequence& sequence) {
  if (!sequence.releasing || sequence.in_flight > 0) return;
  Session& session = sequence.session;
  sequence.pieces.FreeAll();
  session.memory->RemoveReservation(sequence.reserved_chunks);
  if (sequence.state_arena != 0 && session.attach)
    session.attach->RevokeArena(sequence.state_arena);
  if (sequence.served()) {
    FreeDeviceMemory(std::move(sequence.state), session, sequence.gpu_bytes);
  } else {
    FreeSharedMemory(std::move(sequence.state), session, sequence.gpu_bytes);
  }
  const auto callers = std::exchange(sequence.released, {});
  LogInfo("sequence released", {{"session", session.id}, {"sequence", sequence.id}});
  CountReleased(sequence);
  session.sequences.erase(sequence.id);
  RecycleReturned(session);
  PublishStatus();
  for (const auto& caller : callers) caller(true);
  if (session.over) FinishEnd(session);
}

void ServiceCore::Fail(Sequence& sequence, const absl::Status& why) {
  if (!sequence.failure.ok()) return;
  sequence.failure = why;
  ++CountersOf(sequence).failed;
  LogError("sequence failed", {{"session", sequence.session.id},
                               {"sequence", sequence.id},
                               {"why", std::string(why.message())}});
  FailWaiters(sequence, why);
  if (sequence.session.sink) sequence.session.sink->SequenceFailed(sequence.id, why);
}

void ServiceCore::FailWaiters(Sequence& sequence, const absl::Status& why) {
  for (Waiter& waiter : std::exchange(sequence.waiters, {})) {
    --sequence.session.waiters;
    waiter.done(why);
  }
}

void ServiceCore::ListSequences(std::optional<SessionKey> key,
                                Completion<std::vector<SequenceStatus>> done, GrantId grant) {
  Call<std::vector<SequenceStatus>>(
      std::move(done),
      [this, key = std::move(key), grant](const Completion<std::vector<SequenceStatus>>& reply) {
        std::vector<SequenceStatus> list;
        const auto add = [&](const Session& session) {
          for (const auto& [id, sequence] : session.sequences) list.push_back(Describe(*sequence));
        };
        if (key) {
          auto session = FindSession(*key);
          if (!session.ok()) return reply(session.status());
          add(**session);
        } else {
          for (const auto& [id, session] : sessions_) {
            if (grant == kNoGrant || session->hello.grant == grant) add(*session);
          }
        }
        std::ranges::sort(list, {}, &SequenceStatus::sequence);
        reply(std::move(list));
      });
}

SequenceStatus ServiceCore::Describe(const Sequence& sequence) const {
  return {.sequence = sequence.id,
          .session = sequence.session.id,
          .shape = sequence.request.shape,
          .mode = sequence.request.mode,
          .max_tokens = sequence.request.max_tokens,
          .ingested_tokens = sequence.arrived(),
          .prompt_tokens = sequence.prompt_tokens.value_or(0),
          .published_segments = sequence.published_segments,
          .cut = sequence.cut,
          .host_bytes = sequence.pieces.bytes(),
          .state_bytes = sequence.layout.total_bytes,
          .failure = std::string(sequence.failure.message())};
}

}  // namespace clusterkv::service
