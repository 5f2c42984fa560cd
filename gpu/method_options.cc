#include "gpu/method_options.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu {
namespace {

// Bounds keep every later sum of token counts within 32 bits.
constexpr uint32_t kMaxSinkTokens = 1024;
constexpr uint32_t kMaxSegmentTokens = 65'536;
constexpr uint32_t kMaxWindowTokens = 65'536;
constexpr uint32_t kMaxTokensPerCluster = 4096;
constexpr uint32_t kMaxIterations = 1000;
constexpr uint32_t kMaxLagSegments = 64;
constexpr uint32_t kMaxBudgetTokens = 1'048'576;
constexpr uint32_t kMaxCacheTokens = 16'777'216;

absl::Status CheckRange(const char* field, uint32_t value, uint32_t least, uint32_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " is ", value, "; allowed: ", least, " to ", most));
}

MethodOptions PaperPreset() {
  MethodOptions method;
  method.sink_tokens = 16;
  method.min_window_tokens = 0;
  method.decode_segment_tokens = 320;
  // The paper clusters the whole prompt at once; this is the largest segment there is.
  method.prompt_segment_tokens = kMaxSegmentTokens;
  method.tokens_per_cluster = 80;
  method.kmeans_iterations = 20;
  method.group = GroupRule::kSoftmax;
  method.center_keys = false;
  method.estimate = false;
  return method;
}

MethodOptions DefaultPreset() {
  MethodOptions method;
  method.sink_tokens = 16;
  method.min_window_tokens = 64;
  method.decode_segment_tokens = 320;
  method.prompt_segment_tokens = 4096;
  method.tokens_per_cluster = 16;
  method.kmeans_iterations = 10;
  method.group = GroupRule::kSoftmax;
  method.center_keys = true;
  method.estimate = false;
  return method;
}

}  // namespace

const char* GroupRuleName(GroupRule rule) {
  switch (rule) {
    case GroupRule::kSoftmax:
      return "softmax";
    case GroupRule::kMean:
      return "mean";
    case GroupRule::kMax:
      return "max";
  }
  return "unknown";
}

absl::StatusOr<GroupRule> ParseGroupRule(const std::string& name) {
  for (GroupRule rule : {GroupRule::kSoftmax, GroupRule::kMean, GroupRule::kMax}) {
    if (name == GroupRuleName(rule)) return rule;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("group is \"", name, "\"; allowed: softmax, mean, max"));
}

MethodOptions MethodOptions::Resolved(const Shape& shape) const {
  MethodOptions resolved = *this;
  if (cache_tokens == 0) {
    // 64 bits: options need not be valid yet.
    const uint64_t tokens = uint64_t{4} * budget_tokens + uint64_t{4} * tokens_per_cluster;
    resolved.cache_tokens =
        static_cast<uint32_t>(std::min<uint64_t>(tokens, std::numeric_limits<uint32_t>::max()));
  }
  if (softmax_scale == 0.0f && shape.head_dim != 0) {
    resolved.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  }
  return resolved;
}

absl::Status MethodOptions::Validate() const {
  CKV_RETURN_IF_ERROR(CheckRange("sink_tokens", sink_tokens, 0, kMaxSinkTokens));
  CKV_RETURN_IF_ERROR(CheckRange("min_window_tokens", min_window_tokens, 0, kMaxWindowTokens));
  CKV_RETURN_IF_ERROR(
      CheckRange("decode_segment_tokens", decode_segment_tokens, 1, kMaxSegmentTokens));
  CKV_RETURN_IF_ERROR(
      CheckRange("prompt_segment_tokens", prompt_segment_tokens, 1, kMaxSegmentTokens));
  CKV_RETURN_IF_ERROR(
      CheckRange("tokens_per_cluster", tokens_per_cluster, 1, kMaxTokensPerCluster));
  CKV_RETURN_IF_ERROR(CheckRange("kmeans_iterations", kmeans_iterations, 1, kMaxIterations));
  CKV_RETURN_IF_ERROR(CheckRange("window_lag_segments", window_lag_segments, 0, kMaxLagSegments));
  CKV_RETURN_IF_ERROR(CheckRange("budget_tokens", budget_tokens, 1, kMaxBudgetTokens));
  if (group != GroupRule::kSoftmax && group != GroupRule::kMean && group != GroupRule::kMax) {
    return absl::InvalidArgumentError(absl::StrCat("group is ", static_cast<uint32_t>(group),
                                                   "; allowed: 1 (softmax), 2 (mean), 3 (max)"));
  }
  const uint32_t least_cache = 2 * budget_tokens + largest_cluster_tokens();
  if (cache_tokens != 0 && (cache_tokens < least_cache || cache_tokens > kMaxCacheTokens)) {
    return absl::InvalidArgumentError(
        absl::StrCat("cache_tokens is ", cache_tokens, "; allowed: 0, or ", least_cache,
                     " (2 * budget_tokens + the largest cluster, ", largest_cluster_tokens(),
                     ") to ", kMaxCacheTokens));
  }
  if (!std::isfinite(softmax_scale) || softmax_scale < 0.0f) {
    return absl::InvalidArgumentError(absl::StrCat(
        "softmax_scale is ", softmax_scale, "; allowed: 0 (1 / sqrt(head_dim)) or finite and > 0"));
  }
  return absl::OkStatus();
}

absl::StatusOr<MethodOptions> MethodPreset(std::string_view name) {
  if (name == "paper") return PaperPreset();
  if (name == "default") return DefaultPreset();
  return absl::InvalidArgumentError(absl::StrCat("preset is \"", std::string(name), "\"; allowed: ",
                                                 absl::StrJoin(MethodPresetNames(), ", ")));
}

const std::vector<std::string>& MethodPresetNames() {
  static const auto* const names = new std::vector<std::string>{"default", "paper"};
  return *names;
}

}  // namespace clusterkv::gpu
