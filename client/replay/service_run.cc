#include "client/replay/service_run.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/replay/device_trace.h"
#include "client/replay/interrupt.h"
#include "client/replay/measures.h"
#include "client/replay/step_attention.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::replay {
namespace {

// A prefill's chunk.
constexpr uint32_t kIngestTokens = 512;
// Many sequences on few cores may take long; a daemon that is gone is noticed at once anyway.
constexpr absl::Duration kPatience = absl::Minutes(10);

absl::Status InContext(const absl::Status& status, const std::string& context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

// What a step of one sequence gave in one layer.
struct LayerResult {
  std::vector<float> outputs;     // [q_heads][head_dim]
  std::vector<int32_t> selected;  // [kv_heads][budget]
};

class ServiceRun {
 public:
  ServiceRun(Client& client, const ServiceRunOptions& options, gpu::host::ThreadPool& threads)
      : client_(client),
        options_(options),
        trace_(*options.trace),
        threads_(threads),
        totals_(trace_.shape().layers) {}

  absl::StatusOr<std::vector<LayerTotals>> Run() {
    CKV_ASSIGN_OR_RETURN(tensors_, DeviceTrace::Create(client_.device(), trace_));
    CKV_RETURN_IF_ERROR(Register());
    for (size_t i = 0; i < sequences_.size(); ++i) {
      CKV_RETURN_IF_ERROR(InContext(Ingest(*sequences_[i]), absl::StrCat("sequence ", i)));
    }
    CKV_RETURN_IF_ERROR(WaitForPrompt());
    std::vector<Sequence*> members;
    for (const auto& sequence : sequences_) members.push_back(sequence.get());
    CKV_ASSIGN_OR_RETURN(batch_, client_.CreateBatch(members, {.want_selection = true}));
    CKV_RETURN_IF_ERROR(AllocateResults());
    for (uint32_t step = 0; step < options_.ranges.size(); ++step) {
      CKV_RETURN_IF_ERROR(CheckInterrupt());
      CKV_RETURN_IF_ERROR(InContext(RunStep(step), absl::StrCat("step ", step)));
      if (options_.advance) options_.advance(1);
    }
    CKV_RETURN_IF_ERROR(Finish());
    return std::move(totals_);
  }

 private:
  absl::Status Register() {
    for (uint32_t i = 0; i < options_.sequences; ++i) {
      SequenceOptions sequence;
      sequence.shape = trace_.shape();
      sequence.method = options_.method;
      sequence.method.seed += i;
      // Only the steps that are replayed are ever appended.
      sequence.max_tokens = trace_.prompt_tokens() + static_cast<uint32_t>(options_.ranges.size());
      sequence.mode = options_.mode;
      absl::StatusOr<std::unique_ptr<Sequence>> registered = client_.RegisterSequence(sequence);
      if (!registered.ok()) {
        return InContext(registered.status(), absl::StrCat("registering sequence ", i));
      }
      sequences_.push_back(*std::move(registered));
    }
    return absl::OkStatus();
  }

  gpu::KvSource SourceOf(size_t layer, uint32_t position) const {
    const size_t offset = position * trace_.kv_token_bytes();
    gpu::KvSource source;
    source.k = tensors_->k(layer) + offset;
    source.v = tensors_->v(layer) + offset;
    source.batch_stride = 0;  // every sequence replays the same trace
    source.token_stride = trace_.kv_token_bytes();
    source.head_stride = trace_.head_bytes();
    return source;
  }

  absl::Status Ingest(Sequence& sequence) {
    for (uint32_t position = 0; position < trace_.prompt_tokens(); position += kIngestTokens) {
      IngestRange range;
      range.position = position;
      range.count = std::min(kIngestTokens, trace_.prompt_tokens() - position);
      range.layer_count = 1;  // layers lie apart in the trace
      range.end_of_prompt = position + range.count == trace_.prompt_tokens();
      for (uint32_t layer = 0; layer < trace_.shape().layers; ++layer) {
        CKV_RETURN_IF_ERROR(CheckInterrupt());
        range.layer_begin = layer;
        CKV_RETURN_IF_ERROR(sequence.Ingest(range, SourceOf(layer, position), kPatience));
      }
    }
    return absl::OkStatus();
  }

  absl::Status WaitForPrompt() {
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const absl::StatusOr<Published> published =
          sequences_[i]->WaitPublished(trace_.prompt_tokens(), kPatience);
      CKV_RETURN_IF_ERROR(InContext(published.status(), absl::StrCat("sequence ", i)));
    }
    return absl::OkStatus();
  }

  absl::Status AllocateResults() {
    const gpu::Shape& shape = trace_.shape();
    CKV_ASSIGN_OR_RETURN(
        outputs_, client_.device().AllocatePinned(size_t{shape.layers} * sequences_.size() *
                                                  shape.q_heads * shape.head_dim * sizeof(float)));
    results_.assign(sequences_.size(), std::vector<LayerResult>(shape.layers));
    ranges_.resize(sequences_.size());
    return absl::OkStatus();
  }

  float* outputs(size_t layer, size_t sequence) const {
    const gpu::Shape& shape = trace_.shape();
    const size_t row = size_t{shape.q_heads} * shape.head_dim;
    return reinterpret_cast<float*>(outputs_->data()) +
           (layer * sequences_.size() + sequence) * row;
  }

  // After this the segments that the step shall see are published: exactly the schedule's.
  absl::Status Synchronize(uint32_t step) {
    const StepRange& range = options_.ranges[step];
    for (const auto& sequence : sequences_) {
      if (sequence->published().cut != range.cut) {
        const auto published = sequence->WaitPublished(range.position, kPatience);
        CKV_RETURN_IF_ERROR(published.status());
      }
      if (sequence->published().cut == range.cut) continue;
      return absl::InternalError(absl::StrCat("sequence ", sequence->id(), ": published up to ",
                                              sequence->published().cut, "; the schedule's cut is ",
                                              range.cut));
    }
    return absl::OkStatus();
  }

  absl::Status Begin(uint32_t step) {
    if (options_.publish == Publish::kSync) {
      CKV_RETURN_IF_ERROR(Synchronize(step));
      return batch_->Begin();
    }
    for (const auto& sequence : sequences_) cuts_before_.push_back(sequence->published().cut);
    absl::Status status = batch_->Begin();
    if (status.code() != absl::StatusCode::kResourceExhausted) return status;
    // A window is full: the daemon is behind, and once it has caught up the step can begin.
    cuts_before_.clear();
    for (const auto& sequence : sequences_) {
      const auto published = sequence->WaitPublished(options_.ranges[step].position, kPatience);
      CKV_RETURN_IF_ERROR(published.status());
      cuts_before_.push_back(sequence->published().cut);
    }
    return batch_->Begin();
  }

  absl::Status RunStep(uint32_t step) {
    const gpu::Shape& shape = trace_.shape();
    const uint32_t position = options_.ranges[step].position;
    const size_t row = size_t{shape.q_heads} * shape.head_dim;
    cuts_before_.clear();
    CKV_RETURN_IF_ERROR(Begin(step));
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      CKV_RETURN_IF_ERROR(batch_->Append(layer, SourceOf(layer, position)));
      gpu::QuerySource queries;
      queries.q = tensors_->q(layer) + step * trace_.q_step_bytes();
      queries.head_stride = trace_.head_bytes();
      gpu::AttentionTarget target;
      target.out = outputs(layer, 0);
      target.batch_stride = row;
      target.head_stride = shape.head_dim;
      CKV_RETURN_IF_ERROR(batch_->Attend(layer, queries, target));
      for (size_t i = 0; i < sequences_.size(); ++i) {
        CKV_ASSIGN_OR_RETURN(results_[i][layer].selected, batch_->Selection(i));
      }
    }
    CKV_RETURN_IF_ERROR(batch_->End());
    for (size_t i = 0; i < sequences_.size(); ++i) {
      for (size_t layer = 0; layer < shape.layers; ++layer) {
        const float* const first = outputs(layer, i);
        results_[i][layer].outputs.assign(first, first + row);
      }
      CKV_RETURN_IF_ERROR(InContext(CheckSelection(step, i), absl::StrCat("sequence ", i)));
    }
    if (options_.dump != nullptr) {
      for (size_t layer = 0; layer < shape.layers; ++layer) {
        options_.dump->Set(layer, step, results_[0][layer].outputs, results_[0][layer].selected);
      }
    }
    MeasureStep(step);
    return absl::OkStatus();
  }

  // Positions of one KV head without the -1 beyond the last.
  absl::Span<const int32_t> Chosen(size_t sequence, size_t layer, uint32_t kv_head) const {
    const size_t budget = options_.method.budget_tokens;
    const auto all =
        absl::MakeConstSpan(results_[sequence][layer].selected).subspan(kv_head * budget, budget);
    const auto end = std::find(all.begin(), all.end(), -1);
    return all.subspan(0, static_cast<size_t>(end - all.begin()));
  }

  // Sets ranges_[sequence] to what the step has seen, and checks the choice against it.
  absl::Status CheckSelection(uint32_t step, size_t sequence) {
    const gpu::Shape& shape = trace_.shape();
    StepRange& range = ranges_[sequence];
    range = options_.ranges[step];
    if (options_.publish == Publish::kAsync) range.cut = ObservedCut(sequence, range);
    const size_t count = std::min(options_.method.budget_tokens, range.candidates());
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      const size_t expected_size = size_t{shape.kv_heads} * options_.method.budget_tokens;
      if (results_[sequence][layer].selected.size() != expected_size) {
        return absl::InternalError(absl::StrCat("layer ", layer, ": the selection has ",
                                                results_[sequence][layer].selected.size(),
                                                " entries, not ", expected_size));
      }
      for (uint32_t head = 0; head < shape.kv_heads; ++head) {
        CKV_RETURN_IF_ERROR(InContext(CheckChosen(Chosen(sequence, layer, head), range, count),
                                      absl::StrCat("layer ", layer, ", KV head ", head)));
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckChosen(absl::Span<const int32_t> chosen, const StepRange& range, size_t count) {
    if (chosen.size() != count) {
      return absl::InternalError(absl::StrCat(chosen.size(), " tokens chosen, not ", count, " of ",
                                              range.candidates(), " candidates"));
    }
    sorted_.assign(chosen.begin(), chosen.end());
    std::sort(sorted_.begin(), sorted_.end());
    if (!sorted_.empty() && (sorted_.front() < static_cast<int64_t>(range.sinks) ||
                             sorted_.back() >= static_cast<int64_t>(range.cut))) {
      return absl::InternalError(absl::StrCat("chose positions ", sorted_.front(), " to ",
                                              sorted_.back(), "; candidates are [", range.sinks,
                                              ", ", range.cut, ")"));
    }
    const auto twice = std::adjacent_find(sorted_.begin(), sorted_.end());
    if (twice == sorted_.end()) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("chose position ", *twice, " twice"));
  }

  // The cut that a step saw while publishing went on. A choice below the budget took all
  // candidates; otherwise it is what was known to be published before the step, or the first of the
  // schedule's cuts that the choice lies below. A segment published just then of which nothing was
  // chosen goes unnoticed.
  uint32_t ObservedCut(size_t sequence, const StepRange& range) const {
    uint32_t beyond_last = cuts_before_[sequence];
    for (uint32_t layer = 0; layer < trace_.shape().layers; ++layer) {
      for (uint32_t head = 0; head < trace_.shape().kv_heads; ++head) {
        const absl::Span<const int32_t> chosen = Chosen(sequence, layer, head);
        if (chosen.size() < options_.method.budget_tokens) {
          return range.sinks + static_cast<uint32_t>(chosen.size());
        }
        const int32_t last = *std::max_element(chosen.begin(), chosen.end());
        beyond_last = std::max(beyond_last, static_cast<uint32_t>(last) + 1);
      }
    }
    const auto below = [](const StepRange& scheduled, uint32_t end) { return scheduled.cut < end; };
    const auto found =
        std::lower_bound(options_.ranges.begin(), options_.ranges.end(), beyond_last, below);
    return found == options_.ranges.end() ? range.cut : found->cut;
  }

  void MeasureStep(uint32_t step) {
    const gpu::Shape& shape = trace_.shape();
    const size_t heads = shape.problems();
    std::vector<Measures> sums(sequences_.size() * heads);
    threads_.ParallelFor(sums.size(), [&](size_t task) {
      const size_t problem = task % heads;
      MeasureHead(step, task / heads, problem / shape.kv_heads,
                  static_cast<uint32_t>(problem % shape.kv_heads), sums[task]);
    });
    // One order, whatever the threads did.
    for (size_t task = 0; task < sums.size(); ++task) {
      totals_[task % heads / shape.kv_heads].measures += sums[task];
    }
    for (LayerTotals& layer : totals_) {
      for (const StepRange& range : ranges_) {
        layer.window_tokens += range.window_tokens();
        layer.candidate_tokens += range.candidates();
        ++layer.steps;
      }
    }
  }

  void MeasureHead(uint32_t step, size_t sequence, size_t layer, uint32_t kv_head,
                   Measures& sum) const {
    const gpu::Shape& shape = trace_.shape();
    const size_t group = shape.group_size();
    const StepRange& range = ranges_[sequence];
    const HeadRows rows(trace_, layer, kv_head);
    std::vector<float> queries;
    LoadQueries(trace_, layer, kv_head, step, queries);
    const auto chosen = Chosen(sequence, layer, kv_head);
    absl::Span<const ExactHead> exact = options_.exact->Heads(layer, step, kv_head * group, group);
    size_t count_index = options_.count_index;
    std::vector<ExactHead> unscheduled;
    if (range != options_.ranges[step]) {
      // Other candidates than the table's.
      unscheduled.resize(group);
      StepAttention attention;
      const uint32_t count = static_cast<uint32_t>(chosen.size());
      attention.Compute(trace_, rows, queries, range, absl::MakeConstSpan(&count, 1));
      StoreExact(attention, absl::MakeSpan(unscheduled));
      exact = unscheduled;
      count_index = 0;
    }
    const auto outputs = absl::MakeConstSpan(results_[sequence][layer].outputs)
                             .subspan(kv_head * group * shape.head_dim, group * shape.head_dim);
    ChoiceMeter().Measure(trace_, rows, queries, range, exact, chosen, count_index, outputs, sum);
  }

  absl::Status Finish() {
    for (const auto& sequence : sequences_) {
      for (uint32_t layer = 0; layer < trace_.shape().layers; ++layer) {
        const gpu::LayerCounters counters = sequence->counters(layer);
        totals_[layer].hit_clusters += counters.hit_clusters;
        totals_[layer].missed_clusters += counters.missed_clusters;
        totals_[layer].gathered_bytes += counters.gathered_bytes;
      }
    }
    batch_.reset();
    for (size_t i = 0; i < sequences_.size(); ++i) {
      CKV_RETURN_IF_ERROR(
          InContext(sequences_[i]->Release(), absl::StrCat("releasing sequence ", i)));
    }
    return absl::OkStatus();
  }

  Client& client_;
  const ServiceRunOptions& options_;
  const Trace& trace_;
  gpu::host::ThreadPool& threads_;
  std::unique_ptr<DeviceTrace> tensors_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  std::unique_ptr<DecodeBatch> batch_;  // before its sequences
  std::vector<LayerTotals> totals_;
  // Of the current step.
  std::unique_ptr<gpu::DeviceMemory> outputs_;     // [layers][sequences][q_heads][head_dim], pinned
  std::vector<std::vector<LayerResult>> results_;  // [sequences][layers]
  std::vector<StepRange> ranges_;                  // [sequences]: as the step saw it
  std::vector<uint32_t> cuts_before_;              // [sequences]: published when it began
  std::vector<int32_t> sorted_;
};

}  // namespace

absl::StatusOr<std::vector<LayerTotals>> RunService(Client& client,
                                                    const ServiceRunOptions& options,
                                                    gpu::host::ThreadPool& threads) {
  return ServiceRun(client, options, threads).Run();
}

}  // namespace clusterkv::client::replay
