// Fetch: the cluster cache of one (layer, KV head).
//
//   selected ─► resident? ─yes─► touched          slots of the first `take` rows of each
//                  └─no──► slots (free, else those ──────────────────────────────────────► table
//                          of the least worth) ─► rows gathered from the host store
//
// Whole clusters come and go, by their worth as Select's scores have it (cluster_worth.h).
// last_used marks residence. Clusters of this step are never evicted:
// cache_tokens >= 2 * budget + the largest cluster has room.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gpu/cluster_worth.h"
#include "gpu/host/decode_steps.h"
#include "gpu/host/score_order.h"
#include "gpu/host_chunks.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::host {
namespace {

class HeadCache {
 public:
  HeadCache(const BatchSlot& slot, const StateView& view, uint32_t layer, uint32_t kv_head)
      : host_chunks_(slot.host_chunks),
        view_(view),
        head_(view.layout().head_index(layer, kv_head)),
        step_(view.latch().step),
        clusters_(view.VisibleClusters(head_)) {}

  bool IsVisible(uint32_t cluster) const { return cluster < clusters_; }
  bool IsResident(uint32_t cluster) const { return view_.last_used(head_)[cluster] != 0; }
  void Touch(uint32_t cluster) { view_.last_used(head_)[cluster] = step_; }

  uint32_t Tokens(uint32_t cluster) const {
    return view_.ClusterTokens(view_.clusters(head_)[cluster]);
  }

  absl::Status Load(uint32_t cluster) {
    const ClusterEntry& entry = view_.clusters(head_)[cluster];
    const uint32_t tokens = view_.ClusterTokens(entry);
    const std::byte* const chunk =
        host_chunks_ == nullptr ? nullptr : LoadHostChunk(host_chunks_, entry.chunk);
    if (chunk == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("host chunk ", entry.chunk, " is not mapped"));
    }
    CKV_RETURN_IF_ERROR(MakeRoom(tokens));
    const size_t row_bytes = view_.layout().row_bytes();
    const std::byte* source = chunk + size_t{16} * entry.chunk_offset;
    uint32_t* const free_slots = view_.free_slots(head_);
    uint32_t& free_count = view_.free_count(head_);
    for (uint32_t row = 0; row < tokens; ++row, source += row_bytes) {
      const uint32_t slot = free_slots[--free_count];
      if (slot >= view_.layout().cache_tokens) return Damaged("free slot", slot);
      view_.slot_of_row(head_)[entry.first_row + row] = slot;
      std::memcpy(view_.cache(head_, slot), source, row_bytes);
    }
    Touch(cluster);
    return absl::OkStatus();
  }

  // The slot of a resident cluster's row.
  absl::StatusOr<uint32_t> Slot(uint32_t cluster, uint32_t row) const {
    const uint32_t slot = view_.slot_of_row(head_)[view_.clusters(head_)[cluster].first_row + row];
    if (slot >= view_.layout().cache_tokens) return Damaged("cache slot", slot);
    return slot;
  }

  static absl::Status Damaged(const char* what, uint32_t value) {
    return absl::InternalError(absl::StrCat("sequence state is damaged: ", what, " ", value));
  }

 private:
  absl::Status MakeRoom(uint32_t tokens) {
    uint32_t& free_count = view_.free_count(head_);
    if (free_count > view_.layout().cache_tokens) return Damaged("free_count", free_count);
    while (free_count < tokens) {
      if (!victims_known_) FindVictims();
      if (victims_.empty()) return Damaged("no room in the cluster cache; free slots", free_count);
      std::pop_heap(victims_.begin(), victims_.end(), std::greater<>());
      const auto victim = static_cast<uint32_t>(victims_.back());
      victims_.pop_back();
      CKV_RETURN_IF_ERROR(Evict(victim));
    }
    return absl::OkStatus();
  }

  // Candidates are fixed once the step's hits are touched; misses never become candidates.
  void FindVictims() {
    victims_known_ = true;
    victims_.clear();
    const uint32_t* const last_used = view_.last_used(head_);
    const float* const mean_scores = view_.mean_scores(head_);
    for (uint32_t cluster = 0; cluster < clusters_; ++cluster) {
      if (last_used[cluster] == 0 || last_used[cluster] == step_) continue;
      const float worth = ClusterWorth(view_.layout().group, mean_scores[cluster], Tokens(cluster));
      victims_.push_back(uint64_t{OrderedBits(worth)} << 32 | cluster);
    }
    std::make_heap(victims_.begin(), victims_.end(), std::greater<>());
  }

  absl::Status Evict(uint32_t cluster) {
    const ClusterEntry& entry = view_.clusters(head_)[cluster];
    const uint32_t tokens = view_.ClusterTokens(entry);
    uint32_t& free_count = view_.free_count(head_);
    if (tokens > view_.layout().cache_tokens - free_count) return Damaged("cluster", cluster);
    // Backwards, so that the next to come gets the slots in the order of these rows.
    for (uint32_t row = tokens; row > 0; --row) {
      view_.free_slots(head_)[free_count++] = view_.slot_of_row(head_)[entry.first_row + row - 1];
    }
    view_.last_used(head_)[cluster] = 0;
    return absl::OkStatus();
  }

  static std::vector<uint64_t>& ThreadVictims() {
    thread_local std::vector<uint64_t> victims;
    return victims;
  }

  const std::byte* const* const host_chunks_;
  const StateView& view_;
  const size_t head_;
  const uint32_t step_;
  const uint32_t clusters_;
  bool victims_known_ = false;
  std::vector<uint64_t>& victims_ = ThreadVictims();  // heap of (worth, id), least first
};

// Heads of a layer count together; each is one addition, so that the sampler sees it whole.
void Count(uint64_t& counter, uint64_t amount) {
  std::atomic_ref(counter).fetch_add(amount, std::memory_order_relaxed);
}

void AddCounters(LayerCounters& counters, const LayerCounters& step) {
  Count(counters.hit_clusters, step.hit_clusters);
  Count(counters.missed_clusters, step.missed_clusters);
  Count(counters.hit_tokens, step.hit_tokens);
  Count(counters.missed_tokens, step.missed_tokens);
  Count(counters.gathered_bytes, step.gathered_bytes);
}

}  // namespace

absl::Status FetchHead(const BatchSlot& slot, const StateView& view, uint32_t layer,
                       uint32_t kv_head) {
  const StateLayout& layout = view.layout();
  HeadCache cache(slot, view, layer, kv_head);
  const uint32_t* const selected = view.selected_cluster(kv_head);
  const uint32_t* const take = view.selected_take(kv_head);
  const uint32_t count = std::min(view.selected_count(kv_head), layout.budget_tokens);
  view.slot_count(kv_head) = 0;
  LayerCounters step = {};
  // All hits first: what this step uses must not make room for its misses.
  for (uint32_t i = 0; i < count; ++i) {
    if (!cache.IsVisible(selected[i])) return HeadCache::Damaged("selected cluster", selected[i]);
    if (!cache.IsResident(selected[i])) continue;
    cache.Touch(selected[i]);
    ++step.hit_clusters;
    step.hit_tokens += cache.Tokens(selected[i]);
  }
  uint32_t* const table = view.slot_table(kv_head);
  uint32_t slots = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t tokens = cache.Tokens(selected[i]);
    if (!cache.IsResident(selected[i])) {
      CKV_RETURN_IF_ERROR(cache.Load(selected[i]));
      ++step.missed_clusters;
      step.missed_tokens += tokens;
      step.gathered_bytes += uint64_t{tokens} * layout.row_bytes();
    }
    const uint32_t attended = std::min({take[i], tokens, layout.budget_tokens - slots});
    for (uint32_t row = 0; row < attended; ++row) {
      CKV_ASSIGN_OR_RETURN(table[slots], cache.Slot(selected[i], row));
      ++slots;
    }
  }
  view.slot_count(kv_head) = slots;
  AddCounters(view.counters(layer), step);
  return absl::OkStatus();
}

}  // namespace clusterkv::gpu::host
