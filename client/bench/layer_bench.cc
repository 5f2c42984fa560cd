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

// Per layer and for the whole batch, what one forced pattern of misses comes to.
struct Traffic {
  double selected_clusters = 0.0;
  double selected_tokens = 0.0;  // in the slot table
  double missed_tokens = 0.0;    // whole clusters
  double missed_share = 0.0;
  double gathered_bytes = 0.0;
};

class LayerBench {
 public:
  LayerBench(const BenchRun& run, const BatchState& state, uint32_t batch)
      : run_(run),
        state_(state),
        layout_(state.layout()),
        batch_(batch),
        ops_(run.backend.device().decode_ops()) {}

  absl::Status Run() {
    // Every cache filled with what its layer selects; the steps before a run count for the LRU.
    CKV_RETURN_IF_ERROR(state_.Begin(batch_));
    CKV_RETURN_IF_ERROR(state_.Begin(batch_));
    CKV_ASSIGN_OR_RETURN(selections_, state_.SelectAll(batch_));
    for (uint32_t layer = 0; layer < layout_.layers; ++layer) {
      CKV_RETURN_IF_ERROR(Select(layer));
      CKV_RETURN_IF_ERROR(Fetch(layer));
    }
    CKV_RETURN_IF_ERROR(run_.backend.stream().Synchronize());
    if (run_.options.Has("select")) CKV_RETURN_IF_ERROR(MeasureSelect());
    if (run_.options.Has("attend")) CKV_RETURN_IF_ERROR(MeasureAttend());
    const bool step = run_.options.Has("step");
    if (run_.options.Has("fetch") || step) CKV_RETURN_IF_ERROR(MeasureFetch());
    if (step) CKV_RETURN_IF_ERROR(MeasureStep());
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
    CKV_RETURN_IF_ERROR(Select(layer));
    CKV_RETURN_IF_ERROR(Fetch(layer));
    return Attend(layer);
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
    const auto layers = static_cast<double>(layout_.layers);
    const auto missed = static_cast<double>(after.missed_clusters - before.missed_clusters);
    const auto hit = static_cast<double>(after.hit_clusters - before.hit_clusters);
    Traffic traffic;
    traffic.selected_clusters = (missed + hit) / layers;
    traffic.missed_share = missed + hit > 0.0 ? missed / (missed + hit) : 0.0;
    traffic.missed_tokens =
        static_cast<double>(after.missed_tokens - before.missed_tokens) / layers;
    traffic.gathered_bytes =
        static_cast<double>(after.gathered_bytes - before.gathered_bytes) / layers;
    const uint32_t candidates = state_.context().cut() - layout_.sink_tokens;
    traffic.selected_tokens = items() * std::min(state_.budget_tokens(), candidates);
    return traffic;
  }

  double items() const { return static_cast<double>(batch_) * layout_.kv_heads; }
  double q_items() const { return items() * layout_.group_size; }
  double element() const { return static_cast<double>(gpu::SizeOf(layout_.dtype)); }
  double head_dim() const { return layout_.head_dim; }
  double row_bytes() const { return static_cast<double>(layout_.row_bytes()); }
  double clusters() const {  // of all KV heads and sequences
    double sum = 0.0;
    for (uint32_t head = 0; head < layout_.kv_heads; ++head) {
      sum += static_cast<double>(state_.context().cluster_tokens(head).size());
    }
    return sum * batch_;
  }

  // Every visible centroid and the 16-byte entry of its cluster once, the queries once, an 8-byte
  // list entry of each cluster chosen; a product of head_dim for each query head and centroid.
  Work SelectWork() const {
    double chosen = 0.0;
    for (const std::vector<uint32_t>& list : selections_) {
      chosen += static_cast<double>(list.size());
    }
    chosen /= layout_.layers;
    return {.device_bytes = clusters() * (head_dim() * element() + sizeof(gpu::ClusterEntry)) +
                            q_items() * head_dim() * element() + 8.0 * chosen,
            .flops = 2.0 * layout_.group_size * clusters() * head_dim()};
  }

  // Of each selected cluster its list entry (8), its table entry (16) and its clock, read and
  // written (8); of each attended token its slot, read and written (8); of each missed token its
  // row, written, its slot, taken and written (8), and its row over the bus.
  Work FetchWork(const Traffic& traffic) const {
    return {.device_bytes = 32.0 * traffic.selected_clusters + 8.0 * traffic.selected_tokens +
                            (row_bytes() + 8.0) * traffic.missed_tokens,
            .to_device_bytes = traffic.gathered_bytes};
  }

  // Every attended row and slot-table entry once, queries, fp32 outputs and log-sum-exps; a product
  // with K and one with V for each query head and row.
  Work AttendWork() const {
    const double rows = state_.attended_rows();
    const double slots_read = items() * std::min<double>(rows, state_.budget_tokens());
    return {.device_bytes = items() * rows * row_bytes() + 4.0 * slots_read +
                            q_items() * (head_dim() * (element() + 4.0) + 4.0),
            .flops = 4.0 * q_items() * rows * head_dim()};
  }

  // The three, and the new token's row, read and written.
  Work StepWork(const Traffic& traffic) const {
    const Work select = SelectWork(), fetch = FetchWork(traffic), attend = AttendWork();
    return {.device_bytes = select.device_bytes + fetch.device_bytes + attend.device_bytes +
                            2.0 * items() * row_bytes(),
            .to_device_bytes = fetch.to_device_bytes,
            .flops = select.flops + attend.flops};
  }

  Json Shape() const {
    return {{"context", state_.context().options().tokens},
            {"batch", batch_},
            {"budget", state_.budget_tokens()},
            {"window", state_.window_rows()},
            {"clusters_per_head", clusters() / items()},
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
    run_.AddRow("select", Shape(), std::move(samples), SelectWork());
    return absl::OkStatus();
  }

  absl::Status MeasureAttend() {
    CKV_RETURN_IF_ERROR(Select(0));
    CKV_RETURN_IF_ERROR(Fetch(0));
    CKV_ASSIGN_OR_RETURN(std::vector<double> samples,
                         TimeLayers([&](uint32_t layer) { return Attend(layer); }, nullptr));
    run_.AddRow("attend", Shape(), std::move(samples), AttendWork());
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
      run_.AddRow("fetch", Shape(percent), std::move(samples), FetchWork(traffic),
                  {{"missed_clusters_share", traffic.missed_share},
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
      Json extra = {{"missed_clusters_share", traffic.missed_share},
                    {"gathered_bytes", static_cast<uint64_t>(traffic.gathered_bytes)}};
      if (percent > 0) {
        // What the misses cost by themselves, and how much of that the step does not show.
        const double alone = FetchTime(percent) - FetchTime(0);
        extra["all_hits_us"] = all_hits;
        extra["gather_alone_us"] = alone;
        extra["gather_hidden_share"] = alone > 0.0 ? 1.0 - (median - all_hits) / alone : 0.0;
      }
      run_.AddRow("step", Shape(percent), std::move(samples), StepWork(traffic), std::move(extra));
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
