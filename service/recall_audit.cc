#include "service/recall_audit.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/types/span.h"
#include "gpu/host/simd.h"

namespace clusterkv::service {
namespace {

constexpr size_t kBlock = 256;  // rows scored at a time

// Scaled scores of all candidates of one KV head, for each query head of its group.
class Scores {
 public:
  Scores(const AuditStep& step, size_t kv_head, const std::vector<float>& queries)
      : begin_(step.candidates_begin), count_(step.candidates_end - begin_) {
    const size_t dim = step.shape.head_dim;
    const size_t group = step.shape.group_size();
    values_.resize(group * count_);
    const size_t row_bytes = step.shape.row_bytes();
    std::vector<const std::byte*> rows(kBlock);
    std::vector<float> dots(group * kBlock);
    for (const AuditRun& run : step.runs[kv_head]) {
      for (size_t first = 0; first < run.tokens; first += kBlock) {
        const size_t taken = std::min<size_t>(kBlock, run.tokens - first);
        for (size_t i = 0; i < taken; ++i) rows[i] = run.rows + (first + i) * row_bytes;
        gpu::host::DotGroup(step.shape.dtype, &queries[kv_head * group * dim], group, rows.data(),
                            taken, dim, dots.data(), kBlock);
        for (size_t i = 0; i < taken; ++i) {
          const size_t candidate = run.positions[first + i] - begin_;
          if (candidate >= count_) continue;
          for (size_t g = 0; g < group; ++g) {
            const float score = dots[g * kBlock + i] * step.softmax_scale;
            // A NaN has no place in an order.
            values_[g * count_ + candidate] =
                std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
          }
        }
      }
    }
  }

  absl::Span<const float> of(size_t group_head) const {
    return {values_.data() + group_head * count_, count_};
  }

 private:
  const uint32_t begin_;
  const size_t count_;
  std::vector<float> values_;  // [group][candidates]
};

double Recall(absl::Span<const float> scores, const std::vector<bool>& chosen, size_t count) {
  if (count == 0) return 1;
  std::vector<uint32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0u);
  const auto higher = [&](uint32_t a, uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  };
  std::nth_element(order.begin(), order.begin() + static_cast<ptrdiff_t>(count - 1), order.end(),
                   higher);
  size_t found = 0;
  for (size_t i = 0; i < count; ++i) found += chosen[order[i]] ? 1 : 0;
  return static_cast<double>(found) / static_cast<double>(count);
}

double MissedMass(absl::Span<const float> scores, const std::vector<bool>& chosen, double lse) {
  double highest = lse;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (!chosen[i]) highest = std::max(highest, double{scores[i]});
  }
  double missed = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (!chosen[i]) missed += std::exp(scores[i] - highest);
  }
  return missed / (missed + std::exp(lse - highest));
}

}  // namespace

AuditResult RunAudit(const AuditStep& step) {
  const gpu::Shape& shape = step.shape;
  const size_t group = shape.group_size();
  std::vector<float> queries(size_t{shape.q_heads} * shape.head_dim);
  gpu::host::ToFloat(shape.dtype, step.queries.data(), queries.data(), queries.size());
  AuditResult result;
  for (size_t head = 0; head < shape.kv_heads; ++head) {
    std::vector<bool> chosen(step.candidates_end - step.candidates_begin);
    for (const uint32_t position : step.chosen[head]) {
      chosen[position - step.candidates_begin] = true;
    }
    const Scores scores(step, head, queries);
    for (size_t g = 0; g < group; ++g) {
      ++result.heads;
      result.recall_sum += Recall(scores.of(g), chosen, step.chosen[head].size());
      const double lse = step.lse[head * group + g];
      if (!step.exact_lse || !std::isfinite(lse)) continue;
      const double missed = MissedMass(scores.of(g), chosen, lse);
      if (!std::isfinite(missed)) continue;
      ++result.mass_heads;
      result.missed_mass_sum += missed;
    }
  }
  return result;
}

}  // namespace clusterkv::service
