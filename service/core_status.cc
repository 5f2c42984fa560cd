// What the daemon counts and tells: the snapshot, and the samples of what sequences count.
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <utility>

#include "gpu/status_macros.h"
#include "service/core.h"

namespace clusterkv::service {
namespace {

// Sampled in one go, on a thread that has other work, too.
constexpr size_t kSampleSlice = 16;

// What a sequence may count from one sample to the next; more is damage.
constexpr uint64_t kLeap = 1ull << 40;

// So that totals, and sums of two of them, never wrap.
constexpr uint64_t kCeiling = 1ull << 62;

void AddBounded(uint64_t& sum, uint64_t amount) { sum += std::min(amount, kCeiling - sum); }

size_t CountedLayer(size_t layer) { return std::min(layer, kCountedLayers - 1); }

}  // namespace

uint64_t Sequence::cache_bytes() const {
  return uint64_t{layout.layers} * layout.kv_heads * layout.cache_tokens * layout.row_bytes();
}

SequenceCounters& ServiceCore::CountersOf(const Sequence& sequence) {
  return sequence.served() ? counters_.served_sequences : counters_.direct_sequences;
}

CacheFill& ServiceCore::FillOf(const Sequence& sequence) {
  return sequence.served() ? counters_.served_fill : counters_.direct_fill;
}

void ServiceCore::CountRegistered(const Sequence& sequence) {
  ++CountersOf(sequence).registered;
  FillOf(sequence).capacity_bytes += sequence.cache_bytes();
  auto& layers = (sequence.served() ? counters_.served : counters_.direct).layers;
  layers.resize(std::max(layers.size(), CountedLayer(sequence.layers.size() - 1) + 1));
}

void ServiceCore::CountReleased(const Sequence& sequence) {
  ++CountersOf(sequence).released;
  counters_.clustering.pending_segments -= sequence.pending.size();
  FillOf(sequence).capacity_bytes -= sequence.cache_bytes();
  FillOf(sequence).used_bytes -= sequence.cached_bytes;
}

// --- Samples of sequences -----------------------------------------------------------------------

struct ServiceCore::Sample {
  uint32_t steps = 0;
  std::vector<gpu::LayerCounters> counters;  // [layers]
  std::vector<uint32_t> free_slots;          // [layers][kv_heads]
};

// In the order of the copies: what is counted later than a miss must not look older, or evictions
// would be counted twice.
absl::StatusOr<ServiceCore::Sample> ServiceCore::TakeSample(const Sequence& sequence) {
  const gpu::StateLayout& layout = sequence.layout;
  gpu::Stream& stream = sequence.served() ? *serve_stream_ : *memory_stream_;
  const std::byte* const state = sequence.state->data();
  Sample sample;
  sample.counters.resize(layout.layers);
  sample.free_slots.resize(size_t{layout.layers} * layout.kv_heads);
  const auto copy = [&](void* destination, uint64_t offset, size_t bytes) {
    return stream.CopyAsync(destination, state + offset, bytes);
  };
  absl::Status status =
      copy(&sample.steps, layout.latch + offsetof(gpu::StepLatch, step), sizeof(sample.steps));
  if (status.ok()) {
    status = copy(sample.counters.data(), layout.counters,
                  sample.counters.size() * sizeof(gpu::LayerCounters));
  }
  if (status.ok()) {
    status = copy(sample.free_slots.data(), layout.free_count,
                  sample.free_slots.size() * sizeof(uint32_t));
  }
  const absl::Status finished = stream.Synchronize();  // always: the copies write into the sample
  CKV_RETURN_IF_ERROR(status);
  CKV_RETURN_IF_ERROR(finished);
  return sample;
}

// On a thread of device work: on a GPU a copy must not hold up the core. That of a served sequence
// is the one that serves it, so that no step runs meanwhile.
void ServiceCore::TakeSamples(std::vector<Sequence*> sequences) {
  std::erase_if(sequences, [](const Sequence* sequence) { return sequence->state == nullptr; });
  std::stable_partition(sequences.begin(), sequences.end(),
                        [](const Sequence* sequence) { return sequence->served(); });
  for (size_t begin = 0; begin < sequences.size();) {
    const bool served = sequences[begin]->served();
    std::vector<Sequence*> slice;
    while (begin < sequences.size() && sequences[begin]->served() == served &&
           slice.size() < kSampleSlice) {
      slice.push_back(sequences[begin++]);
    }
    for (Sequence* sequence : slice) {
      sequence->sampling = true;
      ++sequence->in_flight;  // so that it stays
    }
    (served ? serve_ : memory_).Post([this, slice] {
      auto samples = std::make_shared<std::vector<absl::StatusOr<Sample>>>();
      for (const Sequence* sequence : slice) samples->push_back(TakeSample(*sequence));
      core_.Post([this, slice, samples] {
        for (size_t i = 0; i < slice.size(); ++i) {
          Sequence& sequence = *slice[i];
          --sequence.in_flight;
          sequence.sampling = false;
          if ((*samples)[i].ok()) FoldSample(sequence, *(*samples)[i]);
          MaybeFinishRelease(sequence);
        }
        PublishStatus();
      });
    });
  }
}

// A worker can write all of it: a value that falls or leaps is ignored.
void ServiceCore::FoldSample(Sequence& sequence, const Sample& sample) {
  // What a served sequence counts has come with each step's report.
  for (size_t layer = 0; !sequence.served() && layer < sample.counters.size(); ++layer) {
    FoldCounters(sequence, layer, sample.counters[layer]);
  }
  if (sample.steps >= sequence.steps) {
    AddBounded(CountersOf(sequence).decode_steps, sample.steps - sequence.steps);
    sequence.steps = sample.steps;
  } else {
    ++counters_.ignored_samples;
  }
  CacheCounters& total = sequence.served() ? counters_.served : counters_.direct;
  const gpu::StateLayout& layout = sequence.layout;
  if (std::ranges::any_of(sample.free_slots,
                          [&](uint32_t free) { return free > layout.cache_tokens; })) {
    ++counters_.ignored_samples;
    return;
  }
  uint64_t cached_tokens = 0;
  for (size_t layer = 0; layer < layout.layers; ++layer) {
    uint64_t resident = 0;
    for (size_t head = 0; head < layout.kv_heads; ++head) {
      resident += layout.cache_tokens - sample.free_slots[layer * layout.kv_heads + head];
    }
    cached_tokens += resident;
    // What came and is not there has gone. In the middle of a step it looks like less.
    const uint64_t missed = sample.counters[layer].missed_tokens;
    const uint64_t evicted = missed - std::min(missed, resident);
    uint64_t& before = sequence.evicted_tokens[layer];
    if (evicted <= before || evicted - before > kLeap) continue;
    AddBounded(total.evicted_tokens, evicted - before);
    AddBounded(total.evicted_bytes, (evicted - before) * layout.row_bytes());
    before = evicted;
  }
  CacheFill& fill = FillOf(sequence);
  fill.used_bytes -= sequence.cached_bytes;
  sequence.cached_bytes = cached_tokens * layout.row_bytes();
  fill.used_bytes += sequence.cached_bytes;
}

void ServiceCore::FoldCounters(Sequence& sequence, size_t layer, const gpu::LayerCounters& now) {
  CacheCounters& total = sequence.served() ? counters_.served : counters_.direct;
  const uint64_t row_bytes = sequence.layout.row_bytes();
  const auto fold = [this](uint64_t after, uint64_t& before) {
    if (after < before || after - before > kLeap) {
      ++counters_.ignored_samples;
      return uint64_t{0};
    }
    return after - std::exchange(before, after);
  };
  gpu::LayerCounters& before = sequence.counters[layer];
  const uint64_t hit_clusters = fold(now.hit_clusters, before.hit_clusters);
  const uint64_t missed_clusters = fold(now.missed_clusters, before.missed_clusters);
  const uint64_t hit_tokens = fold(now.hit_tokens, before.hit_tokens);
  const uint64_t missed_tokens = fold(now.missed_tokens, before.missed_tokens);
  AddBounded(total.hit_clusters, hit_clusters);
  AddBounded(total.missed_clusters, missed_clusters);
  AddBounded(total.layers[CountedLayer(layer)].hit_clusters, hit_clusters);
  AddBounded(total.layers[CountedLayer(layer)].missed_clusters, missed_clusters);
  AddBounded(total.hit_tokens, hit_tokens);
  AddBounded(total.missed_tokens, missed_tokens);
  AddBounded(total.hit_bytes, hit_tokens * row_bytes);
  AddBounded(total.missed_bytes, missed_tokens * row_bytes);
  AddBounded(total.gathered_bytes, fold(now.gathered_bytes, before.gathered_bytes));
}

// --- The snapshot -------------------------------------------------------------------------------

// Once a tick: it looks at every chunk and, where no whole one is left, at every hole.
void ServiceCore::MeasureHostMemory() {
  counters_.host_extent_bytes = 0;
  for (const auto& [id, session] : sessions_) {
    counters_.host_extent_bytes += session->memory->extent_bytes();
  }
  counters_.largest_free_extent_bytes = 0;
  if (pool_->status().free_bytes() > 0) {
    counters_.largest_free_extent_bytes = pool_->chunk_bytes();
    return;
  }
  for (const auto& [id, session] : sessions_) {
    counters_.largest_free_extent_bytes =
        std::max(counters_.largest_free_extent_bytes, session->memory->largest_hole());
  }
}

void ServiceCore::PublishStatus() {
  const absl::Time now = options_.now();
  DaemonStatus& status = next_status_;
  status = counters_;
  status.version = options_.version;
  status.backend = device_->backend();
  status.device = device_->description();
  status.gpu = device_->uuid().empty() ? device_->backend() : device_->uuid();
  status.boot_epoch = options_.boot_epoch;
  status.device_age_seconds = absl::ToDoubleSeconds(device_watch_.age(now));
  status.tick_age_seconds = absl::ToDoubleSeconds(now - last_tick_);
  status.draining = draining_;
  status.not_ready_reason = draining_ ? "draining" : device_watch_.problem(now);
  status.ready = status.not_ready_reason.empty();
  status.host = pool_->status();
  status.gpu_used_bytes = gpu_used_bytes_;
  status.gpu_limit_bytes = options_.gpu_memory_bytes;
  for (const auto& [grant, account] : accounts_.grants()) {
    status.grants.push_back({.grant = grant, .host = account->status()});
  }
  for (const auto& [id, session] : sessions_) {
    status.sequences += session->sequences.size();
    status.waiting_calls += session->waiters;
    status.ingest.ranges_in_flight += session->ranges.size();
    status.ingest.ring_used_bytes += session->ranges.bytes();
    status.ingest.ring_bytes += session->ring_bytes;
    if (session->over) continue;
    status.sessions.push_back({.session_id = id,
                               .client_name = session->hello.client_name,
                               .pid = session->peer.pid,
                               .uid = session->peer.uid,
                               .sequences = session->sequences.size(),
                               .host_bytes = session->memory->lent_bytes(),
                               .gpu_bytes = session->gpu_bytes,
                               .age_seconds = absl::ToDoubleSeconds(now - session->opened),
                               .attached = session->was_attached,
                               .grant = session->hello.grant});
  }
  std::lock_guard lock(status_mu_);
  std::swap(status_, next_status_);
  status_taken_ = now;
}

// What a stuck core or thread would hide is taken from outside of it.
DaemonStatus ServiceCore::status() const {
  const absl::Time now = options_.now();
  DaemonStatus status;
  absl::Time taken;
  {
    std::lock_guard lock(status_mu_);
    status = status_;
    taken = status_taken_;
  }
  const double since = std::max(0.0, absl::ToDoubleSeconds(now - taken));
  status.device_age_seconds += since;
  status.tick_age_seconds += since;
  if (status.ready && absl::Seconds(status.tick_age_seconds) > DeviceWatch::kPatience) {
    status.ready = false;
    status.not_ready_reason =
        fmt::format("the core has not run for {:.0f} s", status.tick_age_seconds);
  }
  status.uptime_seconds = absl::ToDoubleSeconds(now - started_);
  status.rejected_attaches = rejected_attaches_.load();
  const std::pair<const char*, TaskQueueLoad> threads[] = {
      {"core", core_.load()},   {"stage", stage_.load()},   {"cluster", scheduler_->thread_load()},
      {"serve", serve_.load()}, {"memory", memory_.load()}, {"audit", audit_.load()}};
  for (const auto& [name, load] : threads) {
    status.threads.push_back({.name = name,
                              .waiting = load.waiting,
                              .tasks = load.tasks,
                              .busy_seconds = load.busy_seconds,
                              .task_age_seconds = load.task_age_seconds});
  }
  const ClusterLoad clustering = scheduler_->load();
  status.clustering.batches = clustering.batches;
  status.clustering.waiting_jobs = clustering.waiting_jobs;
  status.clustering.running_jobs = clustering.running_jobs;
  status.clustering.oldest_job_seconds = clustering.oldest_seconds;
  return status;
}

}  // namespace clusterkv::service
