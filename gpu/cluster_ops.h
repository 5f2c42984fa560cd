// The operations of the daemon's side (design section 3, steps 1 to 3): staging, k-means,
// permutation into cluster order, publishing.
//
//   ring ─stage─► host run, position order ─cluster─► labels, means ─permute─► host run, cluster
//   order ─publish─► metadata in the state, then published_segments (release)
//
// Each call enqueues on a stream and returns; arguments are copied, what they point to must stay
// valid until the stream has passed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/state_layout.h"

namespace clusterkv::gpu {

// Copies `count` tokens of `layer_count` layers out of a ring range, whose layout is
// [layer][K, V][token][kv_head][head_dim] with `range_tokens` tokens, into rows (K then V).
struct StageArgs {
  const std::byte* range = nullptr;
  size_t layer_stride = 0;  // bytes from one layer's K to the next's; 0: they follow one another
  uint32_t range_tokens = 0;
  uint32_t first_token = 0;  // within the range
  uint32_t count = 0;
  uint32_t layer_count = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  DType dtype = DType::kFp16;
  // [layer_count * kv_heads]: where row first_token of each (layer, head) goes.
  std::vector<std::byte*> destinations;
};

// One k-means: the tokens of one segment of one (layer, KV head).
struct ClusterProblem {
  const std::byte* rows = nullptr;  // [tokens] rows in position order
  // [tokens] rows of device memory: where a device that does not compute on host memory copies
  // `rows` first. Null: `rows` lie in device memory. The host backend does not use it.
  std::byte* device_rows = nullptr;
  uint32_t tokens = 0;
  uint32_t clusters = 0;  // k, 1..tokens
  uint64_t seed = 0;
  // Results, device memory. max = MaxClustersOfSegment.
  uint32_t* order = nullptr;         // [tokens]: source row of each row in cluster order;
                                     // ascending within a cluster
  uint32_t* sizes = nullptr;         // [max] tokens of each cluster, 1..largest
  std::byte* centroids = nullptr;    // dtype [max][head_dim]: mean raw key, final labels
  std::byte* value_means = nullptr;  // dtype [max][head_dim]
  uint32_t* count = nullptr;         // clusters found, 1..max; never an empty one
  uint32_t* iterations = nullptr;    // done, 1..ClusterArgs::iterations; null: not asked for
};

struct ClusterArgs {
  uint32_t head_dim = 0;
  DType dtype = DType::kFp16;
  uint32_t iterations = 0;
  uint32_t largest_cluster_tokens = 0;
  bool center_keys = false;
  std::vector<ClusterProblem> problems;
};

// Rows of one run into cluster order. `rows` and `destination` may be the same.
struct PermuteProblem {
  const std::byte* rows = nullptr;
  std::byte* destination = nullptr;  // host store
  std::byte* workspace = nullptr;    // tokens * row_bytes, device memory
  const uint32_t* order = nullptr;   // from ClusterProblem
  uint32_t tokens = 0;
  uint32_t first_position = 0;
  uint32_t* positions = nullptr;  // host store [tokens]: first_position + order[i]
};

struct PermuteArgs {
  size_t row_bytes = 0;
  std::vector<PermuteProblem> problems;
};

// What publishing writes for one (layer, head) of a segment.
struct PublishProblem {
  uint32_t cluster_begin = 0;  // clusters of this (layer, head) published before
  uint32_t cluster_count = 0;
  const uint32_t* sizes = nullptr;
  const std::byte* centroids = nullptr;
  const std::byte* value_means = nullptr;
  uint32_t chunk = 0;             // host chunk index
  uint32_t rows_offset = 0;       // in 16 bytes
  uint32_t positions_offset = 0;  // in 16 bytes
};

struct PublishArgs {
  std::byte* state = nullptr;
  const StateLayout* layout = nullptr;  // the daemon's own
  uint32_t segment = 0;
  uint32_t segment_begin = 0;            // position
  uint32_t segment_end = 0;              // position
  std::vector<PublishProblem> problems;  // [layers * kv_heads]
};

class ClusterOps {
 public:
  virtual ~ClusterOps() = default;

  // Header, free stacks, generation; the block must be zeroed.
  virtual absl::Status Initialize(Stream& stream, std::byte* state, const StateLayout& layout,
                                  uint32_t generation) = 0;
  virtual absl::Status Stage(Stream& stream, StageArgs args) = 0;
  // Batched k-means with cosine distance (ClusterKV section III-B): seeds are distinct random
  // keys, repeatable for a seed; until no label changes or `iterations`. Empty clusters are
  // dropped, one above the largest is split in position order. Independent of thread count.
  virtual absl::Status Cluster(Stream& stream, ClusterArgs args) = 0;
  virtual absl::Status Permute(Stream& stream, PermuteArgs args) = 0;
  // Metadata first, published_segments last (release).
  virtual absl::Status Publish(Stream& stream, PublishArgs args) = 0;
};

}  // namespace clusterkv::gpu
