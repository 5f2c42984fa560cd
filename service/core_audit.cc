// The audit of decode steps: what a worker chose, against exact attention over the host store.
//
//   AuditStep ─► audit thread: check, RunAudit over the rows where they lie ─► counters
//
// The rows of published segments never change, and the sequence stays while its audit runs. One
// audit at a time, and after each as long a pause as keeps the thread within --audit-share of a
// core: what comes meanwhile is skipped, so a worker cannot make us work.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "gpu/status_macros.h"
#include "service/core.h"
#include "service/recall_audit.h"

namespace clusterkv::service {
namespace {

// Candidates times query heads of one audit, some tenths of a second: a release waits for it.
constexpr uint64_t kMaxScores = 1ull << 25;

}  // namespace

void ServiceCore::AuditDecodeStep(SessionKey key, AuditRequest request, Completion<bool> done) {
  Call<bool>(std::move(done), [this, key = std::move(key), request = std::move(request)](
                                  const Completion<bool>& reply) mutable {
    auto session = FindSession(key);
    if (!session.ok()) return reply(session.status());
    auto sequence = FindSequence(**session, request.sequence);
    if (!sequence.ok()) return reply(sequence.status());
    auto step = std::make_shared<AuditStep>();
    absl::Status bad = PrepareAudit(**sequence, std::move(request), *step);
    if (!bad.ok()) return reply(bad);
    const uint64_t scores =
        uint64_t{step->shape.q_heads} * (step->candidates_end - step->candidates_begin);
    if (options_.audit_share <= 0 || auditing_ || options_.now() < next_audit_ ||
        scores > kMaxScores) {
      ++counters_.audit.skipped;
      return reply(false);
    }
    StartAudit(**sequence, step, reply);
  });
}

absl::Status ServiceCore::PrepareAudit(const Sequence& sequence, AuditRequest request,
                                       AuditStep& step) const {
  const gpu::Shape& shape = sequence.request.shape;
  if (sequence.served()) {
    return absl::FailedPreconditionError(
        fmt::format("sequence {} is served: it has nothing to tell", sequence.id));
  }
  if (request.layer >= shape.layers) {
    return absl::InvalidArgumentError(fmt::format("layer {} of {}", request.layer, shape.layers));
  }
  const auto end = std::ranges::find(sequence.segment_ends, request.cut);
  const uint32_t sinks = sequence.method.sink_tokens;
  if (request.cut != sinks && end == sequence.segment_ends.end()) {
    return absl::InvalidArgumentError(
        fmt::format("cut {} is not where a published segment ends", request.cut));
  }
  step.shape = shape;
  step.softmax_scale = sequence.method.softmax_scale;
  step.exact_lse = !sequence.method.estimate;
  step.candidates_begin = sinks;
  step.candidates_end = request.cut;
  step.queries = std::move(request.queries);
  step.lse = std::move(request.lse);
  step.chosen = std::move(request.chosen);
  step.runs.resize(shape.kv_heads);
  uint32_t begin = sinks;
  for (uint32_t segment = 0; begin < request.cut; ++segment) {
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

void ServiceCore::StartAudit(Sequence& sequence, const std::shared_ptr<AuditStep>& step,
                             const Completion<bool>& done) {
  auditing_ = true;
  ++sequence.in_flight;
  audit_.Post([this, &sequence, step, done] {
    const auto begun = std::chrono::steady_clock::now();
    const absl::Status checked = CheckAuditStep(*step);
    const AuditResult result = checked.ok() ? RunAudit(*step) : AuditResult();
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    core_.Post([this, &sequence, checked, result, seconds, done] {
      auditing_ = false;
      next_audit_ = options_.now() + absl::Seconds(seconds * (1 / options_.audit_share - 1));
      AuditStatus& audit = counters_.audit;
      audit.steps += checked.ok() ? 1 : 0;
      audit.seconds += seconds;
      audit.recall_heads += result.heads;
      audit.recall_sum += result.recall_sum;
      audit.mass_heads += result.mass_heads;
      audit.missed_mass_sum += result.missed_mass_sum;
      --sequence.in_flight;
      MaybeFinishRelease(sequence);
      PublishStatus();
      if (checked.ok()) return done(true);
      done(checked);
    });
  });
}

}  // namespace clusterkv::service
