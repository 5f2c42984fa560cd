#include "gpu/selection.h"

#include <algorithm>

#include "gpu/copy_back.h"
#include "gpu/host_chunks.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu {
namespace {

constexpr uint64_t kOffsetUnit = 16;

}  // namespace

absl::StatusOr<std::vector<int32_t>> ReadSelection(Stream& stream, const BatchSlot& slot,
                                                   uint32_t layer, uint32_t budget_tokens) {
  const StateLayout& layout = *slot.layout;
  // Nothing beyond what the step has latched: later segments are being published meanwhile.
  CKV_ASSIGN_OR_RETURN(const auto latch, CopyBack<StepLatch>(stream, slot.state + layout.latch, 1));
  const uint32_t segments = std::min(latch[0].segments, layout.max_segments);
  CKV_ASSIGN_OR_RETURN(
      const auto counts,
      CopyBack<uint32_t>(stream, slot.state + layout.selected_count, layout.kv_heads));
  std::vector<int32_t> positions(size_t{layout.kv_heads} * budget_tokens, -1);
  for (uint32_t head = 0; head < layout.kv_heads; ++head) {
    const size_t count = std::min(counts[head], layout.budget_tokens);
    const size_t scratch = size_t{head} * layout.budget_tokens * sizeof(uint32_t);
    const size_t index = layout.head_index(layer, head);
    CKV_ASSIGN_OR_RETURN(
        const auto clusters,
        CopyBack<uint32_t>(stream, slot.state + layout.selected_cluster + scratch, count));
    CKV_ASSIGN_OR_RETURN(
        const auto takes,
        CopyBack<uint32_t>(stream, slot.state + layout.selected_take + scratch, count));
    CKV_ASSIGN_OR_RETURN(const auto runs,
                         CopyBack<SegmentRun>(stream,
                                              slot.state + layout.segment_runs +
                                                  index * layout.max_segments * sizeof(SegmentRun),
                                              segments));
    const uint32_t known =
        runs.empty() ? 0 : std::min(runs.back().cluster_end, layout.max_clusters);
    CKV_ASSIGN_OR_RETURN(
        const auto entries,
        CopyBack<ClusterEntry>(
            stream,
            slot.state + layout.clusters + index * layout.max_clusters * sizeof(ClusterEntry),
            known));
    size_t next = 0;
    for (size_t i = 0; i < count; ++i) {
      if (clusters[i] >= known) return absl::DataLossError("cluster id out of bounds");
      const auto run = std::ranges::find_if(
          runs, [&](const SegmentRun& r) { return clusters[i] < r.cluster_end; });
      if (run == runs.end() || next + takes[i] > budget_tokens) {
        return absl::DataLossError("selection out of bounds");
      }
      const std::byte* const chunk = LoadHostChunk(slot.host_chunks, run->chunk);
      if (chunk == nullptr) return absl::DataLossError("the selection's host chunk is not mapped");
      const auto* tokens =
          reinterpret_cast<const uint32_t*>(chunk + run->positions_offset * kOffsetUnit);
      const uint32_t first = entries[clusters[i]].first_row - run->first_row;
      for (uint32_t t = 0; t < takes[i]; ++t) {
        positions[head * size_t{budget_tokens} + next++] = static_cast<int32_t>(tokens[first + t]);
      }
    }
  }
  return positions;
}

}  // namespace clusterkv::gpu
