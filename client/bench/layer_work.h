// What the operations of one layer of a decode step cannot do without: the formulas behind the
// floors of select, fetch, attend, step and decode.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "client/bench/batch_state.h"
#include "client/bench/ceilings.h"

namespace clusterkv::client::bench {

// One layer of a whole batch, as a mean over the layers.
struct Traffic {
  double selected_clusters = 0.0;
  double selected_tokens = 0.0;  // in the slot table
  double missed_clusters = 0.0;
  double missed_tokens = 0.0;  // whole clusters
  double gathered_bytes = 0.0;

  double missed_share() const {
    return selected_clusters > 0.0 ? missed_clusters / selected_clusters : 0.0;
  }
};

class LayerWork {
 public:
  LayerWork(const BatchState& state, uint32_t batch) : state_(state), batch_(batch) {}

  // Between two readings of the batch's counters, one step apart.
  Traffic Between(const gpu::LayerCounters& before, const gpu::LayerCounters& after) const;

  Work Select(const Traffic& traffic) const;
  Work Fetch(const Traffic& traffic) const;
  Work Attend() const;
  Work Step(const Traffic& traffic) const;

  // Pairs of a sequence and a KV head.
  double items() const { return static_cast<double>(batch_) * state_.layout().kv_heads; }
  double clusters() const;  // of all of them

 private:
  double q_items() const { return items() * state_.layout().group_size; }
  double head_bytes() const { return row_bytes() / 2; }
  double row_bytes() const { return static_cast<double>(state_.layout().row_bytes()); }

  const BatchState& state_;
  const uint32_t batch_;
};

}  // namespace clusterkv::client::bench
