// gather: misses alone, through Fetch itself. Every selected cluster is missed, every cluster has
// the same number of rows, the cache has free room (no eviction), and each layer reads another part
// of the host store. The target that the row tells is 10 us + bytes / (0.92 x the best 64 MB copy).
#include <algorithm>
#include <numeric>
#include <random>

#include "client/bench/bench_run.h"
#include "client/bench/cores.h"
#include "client/bench/pinned_region.h"
#include "gpu/cluster_ops.h"
#include "gpu/dtype.h"
#include "gpu/segment_plan.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr uint32_t kRunRows[] = {16, 80};
constexpr uint32_t kContextRows = 32'768;
constexpr uint64_t kLeastBytes = 128 << 10, kMostBytes = 8 << 20;
constexpr uint32_t kGeneration = 1;

// States whose clusters all have `run_rows` rows.
class GatherBench {
 public:
  GatherBench(const BenchRun& run, uint32_t run_rows, uint32_t batch)
      : run_(run), run_rows_(run_rows), batch_(batch), shape_(run.options.shape) {}

  absl::Status Run() {
    CKV_RETURN_IF_ERROR(Prepare());
    for (uint64_t bytes = kLeastBytes; bytes <= kMostBytes; bytes *= 2) {
      const auto runs = static_cast<uint32_t>((bytes + run_bytes() / 2) / run_bytes());
      if (runs > 0) CKV_RETURN_IF_ERROR(Measure(runs));
    }
    return absl::OkStatus();
  }

 private:
  uint64_t run_bytes() const { return run_rows_ * shape_.row_bytes(); }
  uint32_t items() const { return batch_ * shape_.kv_heads; }
  uint32_t clusters() const { return kContextRows / run_rows_; }

  absl::Status Prepare() {
    gpu::Device& device = run_.backend.device();
    gpu::Stream& stream = run_.backend.stream();
    gpu::MethodOptions method;
    method.sink_tokens = 0;
    method.tokens_per_cluster = run_rows_;
    method.prompt_segment_tokens = 65'536;
    const uint64_t most_runs = (kMostBytes / run_bytes() + items()) / items();
    method.budget_tokens = static_cast<uint32_t>(most_runs) * run_rows_;
    CKV_ASSIGN_OR_RETURN(layout_,
                         gpu::StateLayout::Create(shape_, method.Resolved(shape_), kContextRows));
    const uint32_t rows = clusters() * run_rows_;
    const size_t head_bytes = rows * shape_.row_bytes();
    const size_t layer_bytes = shape_.kv_heads * head_bytes;
    const auto copies = static_cast<uint32_t>(
        std::clamp<uint64_t>(run_.options.store_memory / layer_bytes, 1, shape_.layers));
    gpu::host::ThreadPool threads(UsableCores());
    CKV_ASSIGN_OR_RETURN(store_, PinnedRegion::Create(device, threads, copies * layer_bytes));
    // Rows count up, so that no two of them are the same.
    threads.ParallelFor(store_->bytes() / sizeof(uint64_t) / (1 << 20), [&](size_t piece) {
      auto* const words = reinterpret_cast<uint64_t*>(store_->data()) + (piece << 20);
      std::iota(words, words + (1 << 20), (piece << 20) * 0x9e3779b97f4a7c15ull);
    });
    CKV_ASSIGN_OR_RETURN(chunks_, device.AllocatePinned(sizeof(const std::byte*)));
    reinterpret_cast<const std::byte**>(chunks_->data())[0] = store_->data();

    const size_t mean_bytes = shape_.head_dim * gpu::SizeOf(shape_.dtype);
    CKV_ASSIGN_OR_RETURN(const auto means, device.Allocate(clusters() * mean_bytes));
    CKV_ASSIGN_OR_RETURN(const auto sizes, device.Allocate(clusters() * sizeof(uint32_t)));
    const std::vector<uint32_t> all(clusters(), run_rows_);
    CKV_RETURN_IF_ERROR(stream.CopyAsync(sizes->data(), all.data(), all.size() * sizeof(uint32_t)));
    for (uint32_t i = 0; i < batch_; ++i) {
      CKV_ASSIGN_OR_RETURN(auto state, device.Allocate(layout_.total_bytes));
      CKV_RETURN_IF_ERROR(
          device.cluster_ops().Initialize(stream, state->data(), layout_, kGeneration));
      gpu::PublishArgs publish;
      publish.state = state->data();
      publish.layout = &layout_;
      publish.segment_end = rows;
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
          const size_t offset = layer % copies * layer_bytes + head * head_bytes;
          publish.problems.push_back({.cluster_count = clusters(),
                                      .sizes = reinterpret_cast<const uint32_t*>(sizes->data()),
                                      .centroids = means->data(),
                                      .value_means = means->data(),
                                      .rows_offset = static_cast<uint32_t>(offset / 16)});
        }
      }
      CKV_RETURN_IF_ERROR(device.cluster_ops().Publish(stream, std::move(publish)));
      slots_.push_back({.state = state->data(),
                        .layout = &layout_,
                        .host_chunks = reinterpret_cast<const std::byte* const*>(chunks_->data()),
                        .chunk_count = 1,
                        .generation = kGeneration,
                        .active = 1});
      states_.push_back(std::move(state));
    }
    return stream.Synchronize();
  }

  // Writes what Select would have: the runs dealt out over sequences and KV heads.
  absl::Status SelectRuns(uint32_t runs, CacheEdits& edits) {
    gpu::Stream& stream = run_.backend.stream();
    std::mt19937_64 random(run_.options.seed);
    std::vector<uint32_t> order(clusters());
    for (uint32_t i = 0; i < batch_; ++i) {
      std::byte* const state = slots_[i].state;
      std::vector<uint32_t> counts, ids(size_t{shape_.kv_heads} * layout_.budget_tokens);
      std::vector<uint32_t> takes(ids.size(), run_rows_);
      std::vector<std::vector<uint32_t>> lists;
      for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
        const uint32_t item = i * shape_.kv_heads + head;
        const uint32_t count = runs / items() + (item < runs % items() ? 1 : 0);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random);
        lists.emplace_back(order.begin(), order.begin() + count);
        counts.push_back(count);
        std::copy_n(order.begin(), count, ids.begin() + head * layout_.budget_tokens);
      }
      const auto copy = [&](uint64_t offset, const std::vector<uint32_t>& values) {
        return stream.CopyAsync(state + offset, values.data(), values.size() * sizeof(uint32_t));
      };
      CKV_RETURN_IF_ERROR(copy(layout_.selected_count, counts));
      CKV_RETURN_IF_ERROR(copy(layout_.selected_cluster, ids));
      CKV_RETURN_IF_ERROR(copy(layout_.selected_take, takes));
      CKV_RETURN_IF_ERROR(stream.Synchronize());
      edits.states.push_back(state);
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        for (const std::vector<uint32_t>& list : lists) {
          edits.evict.Add(list);
          edits.fill.Add({});
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status Measure(uint32_t runs) {
    CacheEdits edits;
    edits.layout = layout_;
    CKV_RETURN_IF_ERROR(SelectRuns(runs, edits));
    CKV_ASSIGN_OR_RETURN(const auto editor, run_.backend.MakeEditor(edits));
    gpu::DecodeOps& ops = run_.backend.device().decode_ops();
    Timing timing;
    timing.work = [&](gpu::Stream& stream) {
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        CKV_RETURN_IF_ERROR(ops.Fetch(stream, slots_, layer));
      }
      return absl::OkStatus();
    };
    timing.prepare = [&](gpu::Stream& stream) {
      CKV_RETURN_IF_ERROR(ops.BeginStep(stream, slots_));
      if (!run_.is_cuda()) CKV_RETURN_IF_ERROR(stream.Synchronize());
      return editor->Apply();
    };
    timing.repeats = run_.options.repeats;
    CKV_ASSIGN_OR_RETURN(std::vector<double> samples, run_.backend.Time(timing));
    for (double& sample : samples) sample /= shape_.layers;
    // Each missed row over the bus, and written.
    const double bytes = static_cast<double>(runs) * static_cast<double>(run_bytes());
    const double target = 10.0 + bytes / (0.92 * run_.report.ceilings.to_device) * 1e6;
    const double median = Summarize(samples).median;
    run_.AddRow("gather",
                {{"gathered_bytes", static_cast<uint64_t>(bytes)},
                 {"run_rows", run_rows_},
                 {"runs", runs},
                 {"batch", batch_},
                 {"kv_heads", shape_.kv_heads},
                 {"head_dim", shape_.head_dim},
                 {"dtype", gpu::DTypeName(shape_.dtype)}},
                std::move(samples), {.device_bytes = bytes, .to_device_bytes = bytes},
                {{"target_us", target}, {"target_ratio", target / median}});
    return absl::OkStatus();
  }

  const BenchRun& run_;
  const uint32_t run_rows_;
  const uint32_t batch_;
  const gpu::Shape& shape_;
  gpu::StateLayout layout_;
  std::unique_ptr<PinnedRegion> store_;
  std::unique_ptr<gpu::DeviceMemory> chunks_;  // pinned: one address
  std::vector<std::unique_ptr<gpu::DeviceMemory>> states_;
  std::vector<gpu::BatchSlot> slots_;
};

}  // namespace

absl::Status MeasureGather(const BenchRun& run) {
  if (!run.options.Has("gather")) return absl::OkStatus();
  // The smallest and the largest batch: few long lists, many short ones.
  std::vector<uint32_t> batches = {*std::ranges::min_element(run.options.batches)};
  const uint32_t largest = *std::ranges::max_element(run.options.batches);
  if (largest != batches.front()) batches.push_back(largest);
  for (const uint32_t batch : batches) {
    for (const uint32_t run_rows : kRunRows) {
      CKV_RETURN_IF_ERROR(GatherBench(run, run_rows, batch).Run());
    }
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::client::bench
