// One context whose keys are clustered once, by the backend itself, and published into as many
// sequences as a measurement wants. What they share is what would not fit otherwise: every layer
// has the same clusters (its queries differ, so its selections do), and the host store holds the
// layer's rows as often as it has room, so that layer l reads copy l % copies. Cluster caches,
// windows, centroids and tables are every sequence's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/bench/backend.h"
#include "client/bench/key_model.h"
#include "client/bench/pinned_region.h"
#include "gpu/cluster_ops.h"
#include "gpu/method_options.h"
#include "gpu/segment_plan.h"
#include "gpu/shape.h"

namespace clusterkv::client::bench {

struct ContextOptions {
  gpu::Shape shape;
  gpu::MethodOptions method;
  uint32_t tokens = 0;       // of the sequence; the newest are in its window, as on average
  uint64_t store_bytes = 0;  // for the copies of the layer's rows; one there is in any case
  uint64_t seed = 0;
};

class PublishedContext {
 public:
  static absl::StatusOr<std::unique_ptr<PublishedContext>> Create(Backend& backend,
                                                                  const ContextOptions& options);

  // All segments, into an initialised state of the same shape and method (but for the budget).
  absl::Status PublishTo(std::byte* state, const gpu::StateLayout& layout) const;

  const ContextOptions& options() const { return options_; }
  const KeyModel& model() const { return *model_; }
  const std::byte* store() const { return store_->data(); }  // host chunk 0
  uint32_t copies() const { return copies_; }
  uint32_t cut() const { return segments_.back().end; }
  // Tokens of each cluster of a KV head, by its id.
  const std::vector<uint32_t>& cluster_tokens(uint32_t kv_head) const {
    return cluster_tokens_[kv_head];
  }

 private:
  // Where the results of one segment lie: for all KV heads one behind the other.
  struct SegmentResults {
    std::unique_ptr<gpu::DeviceMemory> memory;
    uint32_t max_clusters = 0;
    std::vector<uint32_t> counts;   // [kv_heads]
    std::vector<size_t> rows;       // [kv_heads]: offset of the run within the layer
    std::vector<size_t> positions;  // [kv_heads]
  };

  PublishedContext(Backend& backend, const ContextOptions& options)
      : backend_(backend), options_(options) {}
  absl::Status Prepare();
  absl::Status ClusterSegment(const gpu::Segment& segment, SegmentResults& results);
  absl::Status ReadSizes(const SegmentResults& results);

  size_t mean_bytes() const { return options_.shape.head_dim * gpu::SizeOf(options_.shape.dtype); }
  uint32_t* sizes(const SegmentResults& results, uint32_t kv_head) const;
  std::byte* centroids(const SegmentResults& results, uint32_t kv_head) const;
  std::byte* value_means(const SegmentResults& results, uint32_t kv_head) const;

  Backend& backend_;
  const ContextOptions options_;
  std::unique_ptr<KeyModel> model_;
  std::vector<gpu::Segment> segments_;
  std::vector<SegmentResults> results_;  // [segments]
  std::vector<std::vector<uint32_t>> cluster_tokens_;
  size_t layer_bytes_ = 0;
  uint32_t copies_ = 1;
  std::unique_ptr<PinnedRegion> store_;
};

}  // namespace clusterkv::client::bench
