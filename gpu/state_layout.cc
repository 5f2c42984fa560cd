#include "gpu/state_layout.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "gpu/segment_plan.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu {
namespace {

constexpr uint32_t kMaxTokens = 16'777'216;
constexpr uint64_t kAlignment = 256;
// No device has more memory; offsets below it cannot overflow in any later sum.
constexpr uint64_t kMaxBytes = uint64_t{1} << 46;

// Hands out offsets one behind the other; remembers that a bound was broken.
class Packer {
 public:
  uint64_t Add(uint64_t elements, uint64_t element_bytes) {
    const uint64_t offset = end_;
    uint64_t bytes = 0;
    if (__builtin_mul_overflow(elements, element_bytes, &bytes) || bytes > kMaxBytes) {
      fits_ = false;
      return offset;
    }
    end_ = (end_ + bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (end_ > kMaxBytes) {
      fits_ = false;
      end_ = 0;  // keeps later sums small; the result is not used
    }
    return offset;
  }

  bool fits() const { return fits_; }
  uint64_t end() const { return end_; }

 private:
  uint64_t end_ = 0;
  bool fits_ = true;
};

absl::Status CheckArguments(const Shape& shape, const MethodOptions& method, uint32_t max_tokens) {
  CKV_RETURN_IF_ERROR(shape.Validate());
  CKV_RETURN_IF_ERROR(method.Validate());
  if (max_tokens < 1 || max_tokens > kMaxTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens is ", max_tokens, "; allowed: 1 to ", kMaxTokens));
  }
  const uint32_t least_cache = 2 * method.budget_tokens + method.largest_cluster_tokens();
  if (method.cache_tokens < least_cache) {
    return absl::InvalidArgumentError(absl::StrCat("cache_tokens is ", method.cache_tokens,
                                                   "; allowed: at least ", least_cache,
                                                   " (2 * budget_tokens + the largest cluster)"));
  }
  if (!(method.softmax_scale > 0.0f)) {
    return absl::InvalidArgumentError(absl::StrCat("softmax_scale is ", method.softmax_scale,
                                                   "; allowed: > 0 (resolve the options first)"));
  }
  return absl::OkStatus();
}

StateLayout Dimensions(const Shape& shape, const MethodOptions& method, uint32_t max_tokens) {
  StateLayout layout = {};
  layout.version = kStateLayoutVersion;
  layout.layers = shape.layers;
  layout.kv_heads = shape.kv_heads;
  layout.group_size = shape.group_size();
  layout.head_dim = shape.head_dim;
  layout.dtype = shape.dtype;
  layout.sink_tokens = method.sink_tokens;
  layout.window_slots =
      method.min_window_tokens + method.decode_segment_tokens * (1 + method.window_lag_segments);
  layout.max_tokens = max_tokens;
  layout.max_rows = max_tokens > method.sink_tokens ? max_tokens - method.sink_tokens : 1;
  layout.max_segments = MaxSegments(method, max_tokens);
  layout.max_clusters = MaxClusters(method, max_tokens);
  layout.cache_tokens = method.cache_tokens;
  layout.budget_tokens = method.budget_tokens;
  layout.group = method.group;
  layout.estimate = method.estimate ? 1 : 0;
  layout.softmax_scale = method.softmax_scale;
  return layout;
}

}  // namespace

absl::StatusOr<StateLayout> StateLayout::Create(const Shape& shape, const MethodOptions& method,
                                                uint32_t max_tokens) {
  CKV_RETURN_IF_ERROR(CheckArguments(shape, method, max_tokens));
  StateLayout layout = Dimensions(shape, method, max_tokens);
  const uint64_t heads = shape.kv_heads;
  const uint64_t problems = shape.problems();  // at most 2^20: products with a u32 fit 64 bits
  const uint64_t mean_bytes = shape.head_dim * SizeOf(shape.dtype);
  const uint64_t clusters = problems * layout.max_clusters;
  const uint64_t budget = heads * layout.budget_tokens;

  Packer packer;
  layout.header = packer.Add(1, sizeof(StateHeader));
  layout.published_segments = packer.Add(1, sizeof(uint32_t));
  layout.latch = packer.Add(1, sizeof(StepLatch));
  layout.counters = packer.Add(shape.layers, sizeof(LayerCounters));
  layout.segment_ends = packer.Add(layout.max_segments, sizeof(uint32_t));
  layout.segment_runs = packer.Add(problems * layout.max_segments, sizeof(SegmentRun));
  layout.clusters = packer.Add(clusters, sizeof(ClusterEntry));
  layout.centroids = packer.Add(clusters, mean_bytes);
  layout.value_means = packer.Add(clusters, mean_bytes);
  layout.sinks = packer.Add(problems * layout.sink_tokens, layout.row_bytes());
  layout.window = packer.Add(problems * layout.window_slots, layout.row_bytes());
  layout.cache = packer.Add(problems * layout.cache_tokens, layout.row_bytes());
  layout.slot_of_row = packer.Add(problems * layout.max_rows, sizeof(uint32_t));
  layout.last_used = packer.Add(clusters, sizeof(uint32_t));
  layout.mean_scores = packer.Add(clusters, sizeof(float));
  layout.free_slots = packer.Add(problems * layout.cache_tokens, sizeof(uint32_t));
  layout.free_count = packer.Add(problems, sizeof(uint32_t));
  layout.selected_count = packer.Add(heads, sizeof(uint32_t));
  layout.selected_cluster = packer.Add(budget, sizeof(uint32_t));
  layout.selected_take = packer.Add(budget, sizeof(uint32_t));
  layout.slot_count = packer.Add(heads, sizeof(uint32_t));
  layout.slot_table = packer.Add(budget, sizeof(uint32_t));
  layout.total_bytes = packer.end();
  if (!packer.fits()) {
    return absl::InvalidArgumentError(absl::StrCat("the state of ", shape.layers, " layers, ",
                                                   shape.kv_heads, " KV heads and ", max_tokens,
                                                   " max_tokens exceeds ", kMaxBytes, " bytes"));
  }
  return layout;
}

}  // namespace clusterkv::gpu
