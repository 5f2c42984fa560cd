// select, fetch, attend, step: one layer of a decode step, timed as all layers one behind the
// other, divided by their number, so that each layer finds its own state cold.
//
// Misses are forced between the runs, not timed: of every selection the wanted share is evicted,
// and long unused clusters take the room (forced_misses.h). The queries stay the same. `fetch`
// alone repeats the selection of layer 0 in every layer, `attend` alone its slot table too: the
// lists lie in one scratch for all layers, and every layer has the same clusters.
#include <algorithm>
#include <optional>

#include "absl/strings/str_cat.h"
#include "client/bench/batch_state.h"
#include "client/bench/bench_run.h"
#include "client/bench/forced_misses.h"
#include "client/bench/layer_work.h"
#include "client/bench/published_context.h"
#include "gpu/dtype.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

using Json = nlohmann::ordered_json;

struct MissTime {
  uint32_t percent = 0;
  double median = 0.0;
};

class LayerBench {
 public:
  LayerBench(const BenchRun& run, const BatchState& state, uint32_t batch)
      : run_(run),
        state_(state),
        layout_(state.layout()),
        batch_(batch),
        work_(state, batch),
        ops_(run.backend.device().decode_ops()) {}

  absl::Status Run() {
    // Every cache filled with what its layer selects; in the second step, since what an edit brings
    // in counts as used in the first.
    CKV_RETURN_IF_ERROR(state_.Begin(batch_));
    CKV_RETURN_IF_ERROR(state_.Begin(batch_));
    CKV_ASSIGN_OR_RETURN(selections_, state_.SelectAll(batch_));
    for (uint32_t layer = 0; layer < layout_.layers; ++layer) {
      CKV_RETURN_IF_ERROR(Select(layer));
      CKV_RETURN_IF_ERROR(Fetch(layer));
    }
    CKV_RETURN_IF_ERROR(run_.backend.stream().Synchronize());
    const bool step = run_.options.Has("step");
    const struct {
      const char* what;
      bool wanted;
      absl::Status (LayerBench::*measure)();
    } measurements[] = {{"select", run_.options.Has("select"), &LayerBench::MeasureSelect},
                        {"attend", run_.options.Has("attend"), &LayerBench::MeasureAttend},
                        {"fetch", run_.options.Has("fetch") || step, &LayerBench::MeasureFetch},
                        {"step", step, &LayerBench::MeasureStep}};
    for (const auto& [what, wanted, measure] : measurements) {
      const absl::Status status = wanted ? (this->*measure)() : absl::OkStatus();
      if (status.ok()) continue;
      return absl::Status(status.code(), absl::StrCat(what, " of batch ", batch_, " at context ",
                                                      state_.context().options().tokens, ": ",
                                                      std::string(status.message())));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Select(uint32_t layer) const {
    return ops_.Select(run_.backend.stream(), slots(), layer, state_.queries(layer),
                       state_.budget_tokens());
  }
  absl::Status Fetch(uint32_t layer) const {
    return ops_.Fetch(run_.backend.stream(), slots(), layer);
  }
  absl::Status Attend(uint32_t layer) const {
    return ops_.Attend(run_.backend.stream(), slots(), layer, state_.queries(layer),
                       state_.target());
  }
  absl::Status StepOf(uint32_t layer) const {
    CKV_RETURN_IF_ERROR(ops_.Append(run_.backend.stream(), slots(), layer, state_.tokens()));
    return ops_.DecodeLayer(run_.backend.stream(), slots(), layer, state_.queries(layer),
                            state_.budget_tokens(), state_.target());
  }
  gpu::Batch slots() const { return state_.slots(batch_); }

  // Samples of one layer's share.
  template <typename LayerWork>
  absl::StatusOr<std::vector<double>> TimeLayers(const LayerWork& layer_work,
                                                 CacheEditor* editor) const {
    Timing timing;
    timing.work = [&](gpu::Stream&) {
      for (uint32_t layer = 0; layer < layout_.layers; ++layer) {
        CKV_RETURN_IF_ERROR(layer_work(layer));
      }
      return absl::OkStatus();
    };
    timing.prepare = [&](gpu::Stream&) { return Prepare(editor); };
    timing.repeats = run_.options.repeats;
    CKV_ASSIGN_OR_RETURN(std::vector<double> samples, run_.backend.Time(timing));
    for (double& sample : samples) sample /= layout_.layers;
    return samples;
  }

  absl::Status Prepare(CacheEditor* editor) const {
    CKV_RETURN_IF_ERROR(state_.Begin(batch_));
    if (editor == nullptr) return absl::OkStatus();
    // The host's editor works at once.
    if (!run_.is_cuda()) CKV_RETURN_IF_ERROR(run_.backend.stream().Synchronize());
    return editor->Apply();
  }

  // What one prepared run counts.
  template <typename LayerWork>
  absl::StatusOr<Traffic> Count(const LayerWork& layer_work, CacheEditor* editor) const {
    CKV_RETURN_IF_ERROR(Prepare(editor));
    CKV_ASSIGN_OR_RETURN(const gpu::LayerCounters before, state_.ReadCounters(batch_));
    for (uint32_t layer = 0; layer < layout_.layers; ++layer) {
      CKV_RETURN_IF_ERROR(layer_work(layer));
    }
    CKV_ASSIGN_OR_RETURN(const gpu::LayerCounters after, state_.ReadCounters(batch_));
    return work_.Between(before, after);
  }

  Json Shape() const {
    return {{"context", state_.context().options().tokens},
            {"batch", batch_},
            {"budget", state_.budget_tokens()},
            {"window", state_.window_rows()},
            {"clusters_per_head", work_.clusters() / work_.items()},
            {"layers", layout_.layers},
            {"kv_heads", layout_.kv_heads},
            {"q_heads", layout_.kv_heads * layout_.group_size},
            {"head_dim", layout_.head_dim},
            {"dtype", gpu::DTypeName(layout_.dtype)},
            {"preset", run_.options.preset}};
  }
  Json Shape(uint32_t percent) const {
    Json shape = Shape();
    shape["misses"] = percent;
    return shape;
  }

  absl::Status MeasureSelect() {
    CKV_ASSIGN_OR_RETURN(std::vector<double> samples,
                         TimeLayers([&](uint32_t layer) { return Select(layer); }, nullptr));
    Traffic traffic;
    for (const std::vector<uint32_t>& list : selections_) {
      traffic.selected_clusters += static_cast<double>(list.size()) / layout_.layers;
    }
    run_.AddRow("select", Shape(), std::move(samples), work_.Select(traffic));
    return absl::OkStatus();
  }

  absl::Status MeasureAttend() {
    CKV_RETURN_IF_ERROR(Select(0));
    CKV_RETURN_IF_ERROR(Fetch(0));
    CKV_ASSIGN_OR_RETURN(std::vector<double> samples,
                         TimeLayers([&](uint32_t layer) { return Attend(layer); }, nullptr));
    run_.AddRow("attend", Shape(), std::move(samples), work_.Attend());
    return absl::OkStatus();
  }

  absl::Status MeasureFetch() {
    CKV_RETURN_IF_ERROR(Select(0));
    Selections repeated = selections_;
    const size_t heads = layout_.head_index(layout_.layers, 0);
    for (size_t item = 0; item < repeated.size(); ++item) {
      repeated[item] = selections_[item / heads * heads + item % layout_.kv_heads];
    }
    const auto work = [&](uint32_t layer) { return Fetch(layer); };
    for (const uint32_t percent : Misses()) {
      CKV_ASSIGN_OR_RETURN(const auto editor, EditorFor(repeated, percent));
      CKV_ASSIGN_OR_RETURN(std::vector<double> samples, TimeLayers(work, editor.get()));
      CKV_ASSIGN_OR_RETURN(const Traffic traffic, Count(work, editor.get()));
      fetch_times_.push_back({percent, Summarize(samples).median});
      if (!run_.options.Has("fetch") || !Wanted(percent)) continue;
      run_.AddRow("fetch", Shape(percent), std::move(samples), work_.Fetch(traffic),
                  {{"missed_clusters_share", traffic.missed_share()},
                   {"gathered_bytes", static_cast<uint64_t>(traffic.gathered_bytes)}});
    }
    return absl::OkStatus();
  }

  absl::Status MeasureStep() {
    const auto work = [&](uint32_t layer) { return StepOf(layer); };
    double all_hits = 0.0;
    for (const uint32_t percent : Misses()) {
      CKV_ASSIGN_OR_RETURN(const auto editor, EditorFor(selections_, percent));
      CKV_ASSIGN_OR_RETURN(std::vector<double> samples, TimeLayers(work, editor.get()));
      CKV_ASSIGN_OR_RETURN(const Traffic traffic, Count(work, editor.get()));
      const double median = Summarize(samples).median;
      if (percent == 0) all_hits = median;
      if (!Wanted(percent)) continue;
      Json extra = {{"missed_clusters_share", traffic.missed_share()},
                    {"gathered_bytes", static_cast<uint64_t>(traffic.gathered_bytes)}};
      if (percent > 0) {
        // What the misses cost by themselves, and how much of that the step does not show.
        const double alone = FetchTime(percent) - FetchTime(0);
        extra["all_hits_us"] = all_hits;
        extra["gather_alone_us"] = alone;
        extra["gather_hidden_share"] = alone > 0.0 ? 1.0 - (median - all_hits) / alone : 0.0;
      }
      run_.AddRow("step", Shape(percent), std::move(samples), work_.Step(traffic),
                  std::move(extra));
    }
    return absl::OkStatus();
  }

  // 0 always comes first: the others are told against it.
  std::vector<uint32_t> Misses() const {
    std::vector<uint32_t> misses = run_.options.misses;
    if (!Wanted(0)) misses.push_back(0);
    std::ranges::sort(misses);
    return misses;
  }
  bool Wanted(uint32_t percent) const {
    return std::ranges::find(run_.options.misses, percent) != run_.options.misses.end();
  }
  double FetchTime(uint32_t percent) const {
    const auto found = std::ranges::find(fetch_times_, percent, &MissTime::percent);
    return found == fetch_times_.end() ? 0.0 : found->median;
  }

  absl::StatusOr<std::unique_ptr<CacheEditor>> EditorFor(const Selections& selections,
                                                         uint32_t percent) const {
    return run_.backend.MakeEditor(
        ForceMisses(state_, batch_, selections, percent, run_.options.seed));
  }

  const BenchRun& run_;
  const BatchState& state_;
  const gpu::StateLayout& layout_;
  const uint32_t batch_;
  const LayerWork work_;
  gpu::DecodeOps& ops_;
  Selections selections_;
  std::vector<MissTime> fetch_times_;
};

absl::Status MeasureBudget(const BenchRun& run, const PublishedContext& context, uint32_t budget) {
  std::vector<uint32_t> batches = run.options.batches;
  std::ranges::sort(batches);
  while (!batches.empty()) {
    const auto state = BatchState::Create(run.backend, context, budget, batches.back());
    if (absl::IsResourceExhausted(state.status())) {
      run.AddNote(absl::StrCat("batch ", batches.back(), " at context ", context.options().tokens,
                               ", budget ", budget,
                               " was left out: ", std::string(state.status().message())));
      batches.pop_back();
      continue;
    }
    CKV_RETURN_IF_ERROR(state.status());
    for (const uint32_t batch : batches) {
      CKV_RETURN_IF_ERROR(LayerBench(run, **state, batch).Run());
    }
    break;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status MeasureLayers(const BenchRun& run) {
  const BenchOptions& options = run.options;
  if (!options.Has("select") && !options.Has("fetch") && !options.Has("attend") &&
      !options.Has("step")) {
    return absl::OkStatus();
  }
  for (const uint32_t tokens : options.contexts) {
    ContextOptions context_options = {.shape = options.shape,
                                      .method = options.method.Resolved(options.shape),
                                      .tokens = tokens,
                                      .store_bytes = options.store_memory,
                                      .seed = options.seed};
    CKV_ASSIGN_OR_RETURN(const auto context,
                         PublishedContext::Create(run.backend, context_options));
    for (const uint32_t budget : options.budgets) {
      CKV_RETURN_IF_ERROR(MeasureBudget(run, *context, budget));
    }
  }
  run.AddNote(
      "select, fetch, attend, step: misses are forced between the runs, by evicting a share of "
      "each "
      "selection and filling the cache with clusters that the run evicts again; layers share one "
      "clustering, and the host store holds the layer's rows as often as --store-memory allows");
  return absl::OkStatus();
}

}  // namespace clusterkv::client::bench
