#include "client/bench/host_backend.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "client/bench/cores.h"
#include "client/bench/fma_peak.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kCopyPiece = 1 << 20;

double MicrosecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

class HostCacheEditor final : public CacheEditor {
 public:
  HostCacheEditor(CacheEdits edits, gpu::host::ThreadPool& threads)
      : edits_(std::move(edits)), threads_(threads) {}

  absl::Status Apply() override {
    const size_t heads = edits_.layout.head_index(edits_.layout.layers, 0);
    threads_.ParallelFor(edits_.states.size() * heads, [&](size_t item) {
      Edit(edits_.states[item / heads], item % heads, item);
    });
    return absl::OkStatus();
  }

 private:
  void Edit(std::byte* state, size_t head, size_t item) const {
    const gpu::StateLayout& layout = edits_.layout;
    const auto* const entries =
        gpu::At<gpu::ClusterEntry>(state, layout.clusters) + head * layout.max_clusters;
    auto* const last_used = gpu::At<uint32_t>(state, layout.last_used) + head * layout.max_clusters;
    auto* const slots = gpu::At<uint32_t>(state, layout.slot_of_row) + head * layout.max_rows;
    auto* const free = gpu::At<uint32_t>(state, layout.free_slots) + head * layout.cache_tokens;
    uint32_t& free_count = gpu::At<uint32_t>(state, layout.free_count)[head];
    for (uint32_t i = edits_.evict.begins[item]; i < edits_.evict.begins[item + 1]; ++i) {
      const uint32_t cluster = edits_.evict.clusters[i];
      if (last_used[cluster] == 0) continue;
      last_used[cluster] = 0;
      const gpu::ClusterEntry& entry = entries[cluster];
      std::copy_n(slots + entry.first_row, entry.tokens, free + free_count);
      free_count += entry.tokens;
    }
    for (uint32_t i = edits_.fill.begins[item]; i < edits_.fill.begins[item + 1]; ++i) {
      const uint32_t cluster = edits_.fill.clusters[i];
      const gpu::ClusterEntry& entry = entries[cluster];
      if (last_used[cluster] != 0 || entry.tokens > free_count) continue;
      last_used[cluster] = 1;
      free_count -= entry.tokens;
      std::copy_n(free + free_count, entry.tokens, slots + entry.first_row);
    }
  }

  const CacheEdits edits_;
  gpu::host::ThreadPool& threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> HostBackend::Create(std::unique_ptr<gpu::Device> device) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::Stream> stream, device->CreateStream("bench"));
  return std::unique_ptr<Backend>(new HostBackend(std::move(device), std::move(stream)));
}

HostBackend::HostBackend(std::unique_ptr<gpu::Device> device, std::unique_ptr<gpu::Stream> stream)
    : device_(std::move(device)), stream_(std::move(stream)), threads_(UsableCores()) {}

absl::StatusOr<std::vector<double>> HostBackend::Time(const Timing& timing) {
  std::vector<double> samples;
  for (uint32_t i = 0; i < timing.repeats + 1; ++i) {
    if (timing.prepare) CKV_RETURN_IF_ERROR(timing.prepare(*stream_));
    CKV_RETURN_IF_ERROR(stream_->Synchronize());
    const Clock::time_point start = Clock::now();
    CKV_RETURN_IF_ERROR(timing.work(*stream_));
    CKV_RETURN_IF_ERROR(stream_->Synchronize());
    if (i > 0) samples.push_back(MicrosecondsSince(start));  // the first warms up
  }
  return samples;
}

absl::Status HostBackend::Copy(std::byte* to, const std::byte* from, size_t bytes) {
  CKV_RETURN_IF_ERROR(stream_->Synchronize());
  threads_.ParallelFor((bytes + kCopyPiece - 1) / kCopyPiece, [&](size_t piece) {
    const size_t begin = piece * kCopyPiece;
    std::memcpy(to + begin, from + begin, std::min(kCopyPiece, bytes - begin));
  });
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CacheEditor>> HostBackend::MakeEditor(const CacheEdits& edits) {
  return std::make_unique<HostCacheEditor>(edits, threads_);
}

absl::StatusOr<double> HostBackend::MeasureFlops() {
  const auto threads = static_cast<size_t>(threads_.threads());
  std::vector<double> flops(threads);
  double best = 0.0;
  for (int run = 0; run < 5; ++run) {
    const Clock::time_point start = Clock::now();
    threads_.ParallelFor(threads, [&](size_t i) { flops[i] = MultiplyAdds(); });
    double total = 0.0;
    for (const double done : flops) total += done;
    best = std::max(best, total / MicrosecondsSince(start) * 1e6);
  }
  return best;
}

absl::StatusOr<std::unique_ptr<Model>> HostBackend::CreateModel(const ModelSize& /*size*/,
                                                                uint32_t /*max_batch*/) {
  return absl::UnavailableError("decode needs the cuda backend");
}

}  // namespace clusterkv::client::bench
