// The parameters of the method (ClusterKV, arXiv 2412.03213, section III), per sequence.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/kinds.h"
#include "gpu/shape.h"

namespace clusterkv::gpu {

const char* GroupRuleName(GroupRule rule);
absl::StatusOr<GroupRule> ParseGroupRule(const std::string& name);

struct MethodOptions {
  uint32_t sink_tokens = 16;              // 0..1024
  uint32_t min_window_tokens = 0;         // exact newest tokens, at least; 0..65,536
  uint32_t decode_segment_tokens = 320;   // 1..65,536
  uint32_t prompt_segment_tokens = 8192;  // 1..65,536
  uint32_t tokens_per_cluster = 80;       // mean cluster size; 1..4096
  uint32_t kmeans_iterations = 10;        // limit; 1..1000
  GroupRule group = GroupRule::kSoftmax;
  bool center_keys = false;          // subtract the segment's mean key before k-means (RetroInfer)
  bool estimate = false;             // unselected clusters count by centroid, value mean and size
  uint32_t window_lag_segments = 3;  // decode segments the window may run ahead of publishing
  uint32_t budget_tokens = 1024;     // largest budget of a step; 1..1,048,576
  // Cluster cache of one (layer, KV head); 0 = 4 * budget_tokens + the largest cluster. At least
  // 2 * budget_tokens + the largest cluster, so that a step always fits (a graph cannot fail).
  uint32_t cache_tokens = 0;
  float softmax_scale = 0.0f;  // 0 = 1 / sqrt(head_dim)
  uint64_t seed = 0;           // of k-means

  // A cluster above this is split.
  uint32_t largest_cluster_tokens() const { return 4 * tokens_per_cluster; }
  // With the zeros that mean "default" filled in.
  MethodOptions Resolved(const Shape& shape) const;
  // Errors: INVALID_ARGUMENT naming the field, its value and what is allowed.
  absl::Status Validate() const;

  bool operator==(const MethodOptions&) const = default;
};

// "paper" follows the paper; "default" was chosen by tests/benchmarks/sweep (its table says why).
// Errors: INVALID_ARGUMENT that lists the presets.
absl::StatusOr<MethodOptions> MethodPreset(std::string_view name);
const std::vector<std::string>& MethodPresetNames();

}  // namespace clusterkv::gpu
