// decode: whole steps of the model in one graph, from the hidden states of new tokens to the
// logits, with random weights. clusterkv's layers append, select, fetch and attend, with misses
// forced between the steps; full KV in device memory appends and attends to everything, with the
// same attend kernel (full_kv_state.h). Each at its own largest batch; clusterkv's latency also at
// full KV's.
//
// clusterkv's batch is bounded by --host-memory (a node's, which need not be here: sequences share
// the store that is pinned) or by the device's memory; the row says which.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "client/bench/batch_state.h"
#include "client/bench/bench_run.h"
#include "client/bench/forced_misses.h"
#include "client/bench/full_kv_state.h"
#include "client/bench/layer_work.h"
#include "client/bench/model.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kMaxBatch = 256;
constexpr uint32_t kMaxRepeats = 30;
constexpr double kBytesOfWeight = 2.0;

struct Decoded {
  uint32_t batch = 0;
  double tokens_per_second = 0.0;
  double tokens_per_second_at_floor = 0.0;  // if all of the step ran at the machine's ceilings
};

class DecodeBench {
 public:
  DecodeBench(const BenchRun& run, const ModelSize& size, Model& model)
      : run_(run), size_(size), model_(model), ops_(run.backend.device().decode_ops()) {}

  absl::Status Prepare() {
    CKV_ASSIGN_OR_RETURN(errors_,
                         run_.backend.device().AllocatePinned(kMaxBatch * sizeof(uint32_t)));
    return absl::OkStatus();
  }

  absl::StatusOr<Decoded> MeasureFullKv(uint32_t tokens) {
    CKV_ASSIGN_OR_RETURN(const auto state, FullKvState::Create(run_.backend, size_.shape, tokens,
                                                               kMaxBatch, run_.options.seed));
    const auto attend = [&](uint32_t layer) {
      return ops_.Attend(run_.backend.stream(), state->slots(), layer, model_.queries(),
                         model_.target());
    };
    Timing step;
    step.work = [&](gpu::Stream&) { return Step(state->slots(), attend); };
    step.prepare = [&](gpu::Stream&) { return state->Rewind(); };
    step.repeats = repeats();
    CKV_ASSIGN_OR_RETURN(std::vector<double> samples, run_.backend.Time(step));
    CKV_RETURN_IF_ERROR(CheckErrors(state->sequences()));
    Timing attention;
    attention.work = [&](gpu::Stream&) {
      for (uint32_t layer = 0; layer < size_.shape.layers; ++layer) {
        CKV_RETURN_IF_ERROR(attend(layer));
      }
      return absl::OkStatus();
    };
    attention.repeats = repeats();
    CKV_ASSIGN_OR_RETURN(const std::vector<double> alone, run_.backend.Time(attention));
    // Every token's row of every layer and KV head once; products with K and with V.
    const double rows = static_cast<double>(state->sequences()) * (tokens + 1.0) *
                        static_cast<double>(size_.shape.problems());
    const Work read = {.device_bytes = rows * static_cast<double>(size_.shape.row_bytes()),
                       .flops = 4.0 * rows * size_.shape.group_size() * size_.shape.head_dim};
    const double attention_us = Summarize(alone).median;
    const double attention_floor = FloorOf(read, run_.report.ceilings).microseconds;
    Json shape = {{"method", "full-kv"},
                  {"context", tokens},
                  {"batch", state->sequences()},
                  {"bound", state->sequences() == kMaxBatch ? "batch" : "device-memory"}};
    return AddRow(
        std::move(shape), state->sequences(), std::move(samples), read,
        {{"attention_us", attention_us}, {"attention_ratio", attention_floor / attention_us}});
  }

  absl::Status MeasureClusterKv(uint32_t tokens, const Decoded& full) {
    const gpu::Shape& shape = size_.shape;
    const ContextOptions options = {.shape = shape,
                                    .method = run_.options.method.Resolved(shape),
                                    .tokens = tokens,
                                    .store_bytes = run_.options.store_memory,
                                    .seed = run_.options.seed};
    CKV_ASSIGN_OR_RETURN(const auto context, PublishedContext::Create(run_.backend, options));
    // A row and its position for each token, layer and KV head.
    const uint64_t host_bytes =
        uint64_t{tokens} * (shape.token_bytes() + shape.problems() * sizeof(uint32_t));
    const uint64_t host_batch = std::max<uint64_t>(1, run_.options.host_memory / host_bytes);
    const auto most = static_cast<uint32_t>(std::min<uint64_t>(host_batch, kMaxBatch));
    for (const uint32_t budget : run_.options.budgets) {
      CKV_ASSIGN_OR_RETURN(
          const auto state,
          BatchState::Create(run_.backend, *context, budget, most, BatchState::Fit::kAsManyAsFit));
      const char* const bound = state->sequences() < most ? "device-memory"
                                : most == host_batch      ? "host-memory"
                                                          : "batch";
      CKV_RETURN_IF_ERROR(MeasureBatch(*state, state->sequences(), bound, full));
      if (full.batch > 0 && full.batch < state->sequences()) {
        CKV_RETURN_IF_ERROR(MeasureBatch(*state, full.batch, "full-kv's batch", full));
      }
    }
    return absl::OkStatus();
  }

 private:
  uint32_t repeats() const { return std::min(run_.options.repeats, kMaxRepeats); }

  template <typename Attention>
  absl::Status Step(gpu::Batch slots, const Attention& attention) {
    gpu::Stream& stream = run_.backend.stream();
    const auto batch = static_cast<uint32_t>(slots.size());
    CKV_RETURN_IF_ERROR(model_.Begin(batch));
    CKV_RETURN_IF_ERROR(ops_.BeginStep(stream, slots));
    for (uint32_t layer = 0; layer < size_.shape.layers; ++layer) {
      CKV_RETURN_IF_ERROR(model_.Project(layer, batch));
      CKV_RETURN_IF_ERROR(ops_.Append(stream, slots, layer, model_.tokens()));
      CKV_RETURN_IF_ERROR(attention(layer));
      CKV_RETURN_IF_ERROR(model_.Finish(layer, batch));
    }
    CKV_RETURN_IF_ERROR(model_.Logits(batch));
    return ops_.EndStep(stream, slots, absl::MakeSpan(errors(), batch));
  }

  absl::Status CheckErrors(uint32_t batch) const {
    for (uint32_t i = 0; i < batch; ++i) {
      if (errors()[i] == 0) continue;
      return absl::InternalError(
          absl::StrCat("decode: sequence ", i, ": step error ", errors()[i]));
    }
    return absl::OkStatus();
  }

  absl::Status MeasureBatch(const BatchState& state, uint32_t batch, const char* bound,
                            const Decoded& full) {
    gpu::Stream& stream = run_.backend.stream();
    const gpu::Batch slots = state.slots(batch);
    const gpu::StateLayout& layout = state.layout();
    // The queries are the model's own, and the same in every step: so are the selections.
    Selections selections(batch * layout.head_index(layout.layers, 0));
    const auto decode_layer = [&](uint32_t layer) {
      return ops_.DecodeLayer(stream, slots, layer, model_.queries(), state.budget_tokens(),
                              model_.target());
    };
    CKV_RETURN_IF_ERROR(state.Begin(batch));
    CKV_RETURN_IF_ERROR(state.Rewind(batch));
    CKV_RETURN_IF_ERROR(Step(slots, [&](uint32_t layer) {
      CKV_RETURN_IF_ERROR(decode_layer(layer));
      return state.ReadSelection(batch, layer, selections);
    }));
    for (const uint32_t percent : run_.options.decode_misses) {
      CKV_ASSIGN_OR_RETURN(const auto editor,
                           run_.backend.MakeEditor(
                               ForceMisses(state, batch, selections, percent, run_.options.seed)));
      Timing timing;
      timing.work = [&](gpu::Stream&) { return Step(slots, decode_layer); };
      timing.prepare = [&](gpu::Stream&) {
        CKV_RETURN_IF_ERROR(state.Rewind(batch));
        return editor->Apply();
      };
      timing.repeats = repeats();
      CKV_ASSIGN_OR_RETURN(std::vector<double> samples, run_.backend.Time(timing));
      CKV_RETURN_IF_ERROR(CheckErrors(batch));
      CKV_RETURN_IF_ERROR(timing.prepare(stream));
      CKV_ASSIGN_OR_RETURN(const gpu::LayerCounters before, state.ReadCounters(batch));
      CKV_RETURN_IF_ERROR(timing.work(stream));
      CKV_ASSIGN_OR_RETURN(const gpu::LayerCounters after, state.ReadCounters(batch));
      const LayerWork layer_work(state, batch);
      const Traffic traffic = layer_work.Between(before, after);
      Work work = layer_work.Step(traffic);
      work.device_bytes *= layout.layers;
      work.to_device_bytes *= layout.layers;
      work.flops *= layout.layers;
      Json shape = {{"method", "clusterkv"},
                    {"context", state.context().options().tokens},
                    {"batch", batch},
                    {"bound", bound},
                    {"budget", state.budget_tokens()},
                    {"window", state.window_rows()},
                    {"misses", percent},
                    {"preset", run_.options.preset}};
      CKV_ASSIGN_OR_RETURN(
          const Decoded decoded,
          AddRow(
              std::move(shape), batch, std::move(samples), work,
              {{"missed_clusters_share", traffic.missed_share()},
               {"gathered_bytes", static_cast<uint64_t>(traffic.gathered_bytes * layout.layers)}}));
      if (full.tokens_per_second > 0.0) {
        // Against full KV as measured here, and against the best that any kernel could make of it.
        Json& extra = run_.report.rows.back().extra;
        extra["times_full_kv"] = decoded.tokens_per_second / full.tokens_per_second;
        extra["times_full_kv_at_floor"] =
            decoded.tokens_per_second / full.tokens_per_second_at_floor;
      }
    }
    return absl::OkStatus();
  }

  // `attention` is all layers'; the weights are read once, and multiplied with each sequence's
  // activations. Activations themselves are not counted.
  absl::StatusOr<Decoded> AddRow(Json shape, uint32_t batch, std::vector<double> samples,
                                 const Work& attention, const Json& extra) {
    Work work = attention;
    work.device_bytes += kBytesOfWeight * size_.weights();
    work.flops += 2.0 * size_.weights() * batch;
    const double median = Summarize(samples).median;
    const double floor = FloorOf(work, run_.report.ceilings).microseconds;
    const Decoded decoded = {.batch = batch,
                             .tokens_per_second = batch / median * 1e6,
                             .tokens_per_second_at_floor = batch / floor * 1e6};
    Json keys = {{"tokens_per_s", decoded.tokens_per_second},
                 {"step_ms", median / 1e3},
                 {"tokens_per_s_at_floor", decoded.tokens_per_second_at_floor}};
    keys.update(extra);
    run_.AddRow("decode", std::move(shape), std::move(samples), work, std::move(keys));
    return decoded;
  }

  uint32_t* errors() const { return reinterpret_cast<uint32_t*>(errors_->data()); }

  const BenchRun& run_;
  const ModelSize& size_;
  Model& model_;
  gpu::DecodeOps& ops_;
  std::unique_ptr<gpu::DeviceMemory> errors_;  // pinned
};

}  // namespace

absl::Status MeasureDecode(const BenchRun& run) {
  if (!run.options.Has("decode")) return absl::OkStatus();
  ModelSize size;
  size.shape = run.options.shape;
  const auto model = run.backend.CreateModel(size, kMaxBatch);
  if (absl::IsUnavailable(model.status())) {
    run.AddNote(
        absl::StrCat("UNAVAILABLE: decode was left out: ", std::string(model.status().message())));
    return absl::OkStatus();
  }
  CKV_RETURN_IF_ERROR(model.status());
  DecodeBench bench(run, size, **model);
  CKV_RETURN_IF_ERROR(bench.Prepare());
  for (const uint32_t tokens : run.options.contexts) {
    absl::StatusOr<Decoded> full = bench.MeasureFullKv(tokens);
    if (absl::IsResourceExhausted(full.status())) {
      run.AddNote(absl::StrCat("decode: full KV of ", tokens, " tokens does not fit once"));
      full = Decoded();
    }
    CKV_RETURN_IF_ERROR(full.status());
    CKV_RETURN_IF_ERROR(bench.MeasureClusterKv(tokens, *full));
  }
  run.AddNote(
      "decode: random weights; RoPE and the embedding's look-up are left out of both; full KV is a "
      "window-only sequence under the same attend kernel (attention_ratio tells how near that is "
      "to "
      "its floor); the sequences of a batch share one host store, --host-memory is what they would "
      "need of their own");
  return absl::OkStatus();
}

}  // namespace clusterkv::client::bench
