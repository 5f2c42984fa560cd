#include "client/bench/layer_work.h"

#include <algorithm>

namespace clusterkv::client::bench {

Traffic LayerWork::Between(const gpu::LayerCounters& before,
                           const gpu::LayerCounters& after) const {
  const gpu::StateLayout& layout = state_.layout();
  const auto per_layer = [&](uint64_t first, uint64_t last) {
    return static_cast<double>(last - first) / layout.layers;
  };
  Traffic traffic;
  traffic.missed_clusters = per_layer(before.missed_clusters, after.missed_clusters);
  traffic.selected_clusters =
      traffic.missed_clusters + per_layer(before.hit_clusters, after.hit_clusters);
  traffic.missed_tokens = per_layer(before.missed_tokens, after.missed_tokens);
  traffic.gathered_bytes = per_layer(before.gathered_bytes, after.gathered_bytes);
  const uint32_t candidates = state_.context().cut() - layout.sink_tokens;
  traffic.selected_tokens = items() * std::min(state_.budget_tokens(), candidates);
  return traffic;
}

double LayerWork::clusters() const {
  double sum = 0.0;
  for (uint32_t head = 0; head < state_.layout().kv_heads; ++head) {
    sum += static_cast<double>(state_.context().cluster_tokens(head).size());
  }
  return sum * batch_;
}

// Every visible centroid and the table entry (16) of its cluster once, the queries once, a list
// entry (8) of each cluster chosen; a product of head_dim for each query head and centroid.
Work LayerWork::Select(const Traffic& traffic) const {
  const gpu::StateLayout& layout = state_.layout();
  return {.device_bytes = clusters() * (head_bytes() + sizeof(gpu::ClusterEntry)) +
                          q_items() * head_bytes() + 8.0 * traffic.selected_clusters,
          .flops = 2.0 * layout.group_size * clusters() * layout.head_dim};
}

// Of each selected cluster its list entry (8), its table entry (16) and its clock, read and written
// (8); of each attended token its slot, read and written (8); of each missed token its slot, taken
// and written (8), and its row, over the bus and into the cache.
Work LayerWork::Fetch(const Traffic& traffic) const {
  return {.device_bytes = 32.0 * traffic.selected_clusters + 8.0 * traffic.selected_tokens +
                          (row_bytes() + 8.0) * traffic.missed_tokens,
          .to_device_bytes = traffic.gathered_bytes};
}

// Every attended row and slot table entry (4) once, the queries, fp32 outputs and log-sum-exps; a
// product with K and one with V for each query head and row.
Work LayerWork::Attend() const {
  const gpu::StateLayout& layout = state_.layout();
  const double rows = state_.attended_rows();
  const double looked_up = rows - layout.sink_tokens - state_.window_rows();
  return {.device_bytes = items() * (rows * row_bytes() + 4.0 * looked_up) +
                          q_items() * (head_bytes() + 4.0 * layout.head_dim + 4.0),
          .flops = 4.0 * q_items() * rows * layout.head_dim};
}

// The three, and the new token's row, read and written.
Work LayerWork::Step(const Traffic& traffic) const {
  const Work select = Select(traffic), fetch = Fetch(traffic), attend = Attend();
  return {.device_bytes = select.device_bytes + fetch.device_bytes + attend.device_bytes +
                          2.0 * items() * row_bytes(),
          .to_device_bytes = fetch.to_device_bytes,
          .flops = select.flops + attend.flops};
}

}  // namespace clusterkv::client::bench
