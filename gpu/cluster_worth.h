// What the cluster cache goes by when it evicts: each cluster's score for its KV head in a running
// mean over the steps, used or not, and what that makes its slots worth. The least worth goes
// first. Plain C++ and CUDA; tests/benchmarks/cache_policies.md says why it is this.
#pragma once

#include <cmath>
#include <cstdint>

#include "gpu/host_device.h"
#include "gpu/kinds.h"

namespace clusterkv::gpu {

// A step's share of the mean: after 10 steps a tenth is left of what was before.
constexpr float kScoreShare = 0.2f;

// After one more step; before the first the mean is 0. What is not finite starts it anew.
CLUSTERKV_HOST_DEVICE inline float NextMeanScore(float mean, float score) {
  const float next = mean + kScoreShare * (score - mean);
  return std::isfinite(next) ? next : 0.0f;
}

// Dividing by the tokens favours hits, not dividing favours fewer bytes read; the root has most of
// both. Scores are shares of attention under kSoftmax, else logits: there a logarithm is
// subtracted.
CLUSTERKV_HOST_DEVICE inline float ClusterWorth(GroupRule rule, float mean_score, uint32_t tokens) {
  const auto size = static_cast<float>(tokens);
  return rule == GroupRule::kSoftmax ? mean_score / std::sqrt(size)
                                     : mean_score - 0.5f * std::log(size);
}

}  // namespace clusterkv::gpu
