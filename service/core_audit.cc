// The audit of decode steps: what a worker chose, against exact attention over the host store.
//
//   AuditStep ─► audit thread: ReadAuditSlot, RunAudit over the rows where they lie ─► counters
//
// The rows of published segments never change, and the sequence stays while its audit runs, so that
// its state and the session's arenas do, too. One audit at a time, and after each as long a pause
// as keeps the thread within --audit-share of a core: what comes meanwhile is skipped, so a worker
// cannot make us work.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "gpu/audit_layout.h"
#include "gpu/status_macros.h"
#include "service/audit_slot.h"
#include "service/core.h"
#include "service/recall_audit.h"

namespace clusterkv::service {
namespace {

// Candidates times query heads of one audit, some tenths of a second: a release waits for it.
constexpr uint64_t kMaxScores = 1ull << 25;

}  // namespace

struct ServiceCore::AuditWork {
  AuditSource source;
  AuditStep step;
};

void ServiceCore::AuditDecodeStep(SessionKey key, AuditRequest request, Completion<bool> done) {
  Call<bool>(std::move(done), [this, key = std::move(key),
                               request = std::move(request)](const Completion<bool>& reply) {
    auto session = FindSession(key);
    if (!session.ok()) return reply(session.status());
    auto sequence = FindSequence(**session, request.sequence);
    if (!sequence.ok()) return reply(sequence.status());
    auto work = std::make_shared<AuditWork>();
    absl::Status bad = PrepareAudit(**session, **sequence, request, *work);
    if (!bad.ok()) return reply(bad);
    const AuditStep& step = work->step;
    const uint64_t scores =
        uint64_t{step.shape.q_heads} * (step.candidates_end - step.candidates_begin);
    if (options_.audit_share <= 0 || auditing_ || options_.now() < next_audit_ ||
        scores > kMaxScores) {
      ++counters_.audit.skipped;
      return reply(false);
    }
    StartAudit(**sequence, work, reply);
  });
}

// What is published now: the step saw that or less.
absl::Status ServiceCore::PrepareAudit(const Session& session, const Sequence& sequence,
                                       const AuditRequest& request, AuditWork& work) const {
  const gpu::Shape& shape = sequence.request.shape;
  if (sequence.served()) {
    return absl::FailedPreconditionError(
        fmt::format("sequence {} is served: it has nothing to tell", sequence.id));
  }
  if (request.layer >= shape.layers) {
    return absl::InvalidArgumentError(fmt::format("layer {} of {}", request.layer, shape.layers));
  }
  const uint64_t slot_bytes = gpu::AuditLayout(sequence.layout).bytes;
  if (request.slot.bytes != slot_bytes) {
    return absl::InvalidArgumentError(
        fmt::format("slot has {} bytes, not {}", request.slot.bytes, slot_bytes));
  }
  CKV_ASSIGN_OR_RETURN(
      const std::byte* const slot,
      ArenaBytes(session, request.slot.arena, request.slot.offset, request.slot.bytes));
  const auto first_head = sequence.published_clusters.begin() +
                          static_cast<ptrdiff_t>(sequence.layout.head_index(request.layer, 0));
  work.source = {.layout = &sequence.layout,
                 .state = sequence.state->data(),
                 .slot = slot,
                 .layer = request.layer,
                 .published_clusters = {first_head, first_head + shape.kv_heads}};
  AuditStep& step = work.step;
  const uint32_t sinks = sequence.method.sink_tokens;
  step.shape = shape;
  step.softmax_scale = sequence.method.softmax_scale;
  step.exact_lse = !sequence.method.estimate;
  step.candidates_begin = sinks;
  step.candidates_end = std::max(sinks, sequence.cut);
  step.runs.resize(shape.kv_heads);
  uint32_t begin = sinks;
  for (uint32_t segment = 0; segment < sequence.published_segments; ++segment) {
    const Piece& piece = sequence.pieces.piece(request.layer, segment);
    const uint32_t tokens = sequence.segment_ends[segment] - begin;
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      step.runs[head].push_back(
          {.rows = sequence.pieces.rows(piece, head),
           .positions = reinterpret_cast<const uint32_t*>(sequence.pieces.positions(piece, head)),
           .tokens = tokens});
    }
    begin = sequence.segment_ends[segment];
  }
  return absl::OkStatus();
}

void ServiceCore::StartAudit(Sequence& sequence, const std::shared_ptr<AuditWork>& work,
                             const Completion<bool>& done) {
  auditing_ = true;
  ++sequence.in_flight;
  audit_.Post([this, &sequence, work, done] {
    const auto begun = std::chrono::steady_clock::now();
    const absl::Status read = ReadAuditSlot(*audit_stream_, work->source, work->step);
    const AuditResult result = read.ok() ? RunAudit(work->step) : AuditResult();
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    core_.Post([this, &sequence, read, result, seconds, done] {
      auditing_ = false;
      next_audit_ = options_.now() + absl::Seconds(seconds * (1 / options_.audit_share - 1));
      AuditStatus& audit = counters_.audit;
      audit.steps += read.ok() ? 1 : 0;
      audit.seconds += seconds;
      audit.recall_heads += result.heads;
      audit.recall_sum += result.recall_sum;
      audit.mass_heads += result.mass_heads;
      audit.missed_mass_sum += result.missed_mass_sum;
      --sequence.in_flight;
      MaybeFinishRelease(sequence);
      PublishStatus();
      if (read.ok()) return done(true);
      done(read);
    });
  });
}

}  // namespace clusterkv::service
