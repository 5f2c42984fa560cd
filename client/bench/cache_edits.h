// What a measurement changes in the cluster caches before each run, so that the run misses what it
// is meant to miss: clusters that go, as if they had been evicted long ago, and clusters that take
// their room, so that the run has to evict them again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "gpu/state_layout.h"

namespace clusterkv::client::bench {

// One list of cluster ids for each (sequence, layer, KV head), one behind the other.
struct ClusterLists {
  std::vector<uint32_t> begins = {0};
  std::vector<uint32_t> clusters;

  void Add(const std::vector<uint32_t>& list) {
    clusters.insert(clusters.end(), list.begin(), list.end());
    begins.push_back(static_cast<uint32_t>(clusters.size()));
  }
};

struct CacheEdits {
  gpu::StateLayout layout;
  std::vector<std::byte*> states;
  ClusterLists evict;  // those that are resident go
  ClusterLists fill;   // then of these, in order, all that fit come, as used in step 1
};

class CacheEditor {
 public:
  virtual ~CacheEditor() = default;
  // Enqueues the edits on the backend's stream, or makes them if that is idle.
  virtual absl::Status Apply() = 0;
};

}  // namespace clusterkv::client::bench
