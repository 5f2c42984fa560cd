#include "client/replay/step_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "gpu/host/simd.h"

namespace clusterkv::client::replay {
namespace {

// fp32 sums run over so many rows at most before they are carried to double. Their weights are
// relative to the block's largest, so that tokens of tiny weight alone do not vanish.
constexpr size_t kBlockRows = 256;

}  // namespace

HeadRows::HeadRows(const Trace& trace, size_t layer, uint32_t kv_head)
    : k(trace.layers()[layer].k + kv_head * trace.head_bytes()),
      v(trace.layers()[layer].v + kv_head * trace.head_bytes()),
      stride(trace.kv_token_bytes()) {}

void LoadQueries(const Trace& trace, size_t layer, uint32_t kv_head, uint32_t step,
                 std::vector<float>& queries) {
  const size_t group = trace.shape().group_size();
  queries.resize(group * trace.shape().head_dim);
  const std::byte* const first =
      trace.layers()[layer].q + step * trace.q_step_bytes() + kv_head * group * trace.head_bytes();
  // The heads of a group are neighbours.
  gpu::host::ToFloat(trace.shape().dtype, first, queries.data(), queries.size());
  gpu::host::Scale(trace.softmax_scale(), queries.data(), queries.size());
}

void OwnTop::Compute(absl::Span<const float> scores, absl::Span<const uint32_t> counts) {
  ranked_.resize(scores.size());
  for (uint32_t i = 0; i < scores.size(); ++i) ranked_[i] = {scores[i], i};
  RankPrefixes(absl::MakeSpan(ranked_), counts);
  levels_.assign(scores.size(), static_cast<uint8_t>(counts.size()));
  last_.clear();
  uint32_t begin = 0;
  Ranked last{std::numeric_limits<double>::infinity(), UINT32_MAX};
  for (size_t level = 0; level < counts.size(); ++level) {
    for (; begin < counts[level]; ++begin) {
      const Ranked& item = ranked_[begin];
      levels_[item.index] = static_cast<uint8_t>(level);
      if (last.index == UINT32_MAX || RanksBefore(last, item)) last = item;
    }
    last_.push_back(last);
  }
}

absl::Span<const float> StepAttention::scores(size_t g) const {
  return absl::MakeConstSpan(scores_.data() + g * range_.length(), range_.length());
}

absl::Span<const double> StepAttention::weights(size_t g) const {
  return absl::MakeConstSpan(weights_.data() + g * range_.length(), range_.length());
}

absl::Span<const double> StepAttention::output(size_t g) const {
  return absl::MakeConstSpan(output_.data() + g * head_dim_, head_dim_);
}

void StepAttention::Compute(const Trace& trace, const HeadRows& rows,
                            absl::Span<const float> queries, const StepRange& range,
                            absl::Span<const uint32_t> counts) {
  range_ = range;
  rows_ = &rows;
  dtype_ = trace.shape().dtype;
  group_ = trace.shape().group_size();
  head_dim_ = trace.shape().head_dim;
  counts_.assign(counts.begin(), counts.end());
  const size_t length = range.length();
  pointers_.resize(length);
  for (size_t i = 0; i < length; ++i) pointers_[i] = rows.Key(i);
  scores_.resize(group_ * length);
  gpu::host::DotGroup(dtype_, queries.data(), group_, pointers_.data(), length, head_dim_,
                      scores_.data(), length);
  ComputeWeights();
  ComputeOutput();
  own_tops_.resize(group_);
  for (size_t g = 0; g < group_; ++g) {
    own_tops_[g].Compute(
        scores(g).subspan(range.sinks < length ? range.sinks : 0, range.candidates()), counts_);
  }
}

void StepAttention::ComputeWeights() {
  const size_t length = range_.length();
  weights_.resize(group_ * length);
  largest_.resize(group_);
  totals_.resize(group_);
  finite_ = true;
  for (size_t g = 0; g < group_; ++g) {
    const float* const score = scores_.data() + g * length;
    double* const weight = weights_.data() + g * length;
    largest_[g] = gpu::host::Max(score, length);
    double total = 0.0;
    for (size_t i = 0; i < length; ++i) {
      weight[i] = std::exp(score[i] - largest_[g]);
      total += weight[i];
    }
    totals_[g] = total;
    finite_ = finite_ && std::isfinite(total) && std::isfinite(largest_[g]);
  }
}

void StepAttention::ComputeOutput() {
  const size_t length = range_.length();
  for (size_t i = positions_.size(); i < length; ++i)
    positions_.push_back(static_cast<uint32_t>(i));
  sum_.Reset(group_, head_dim_);
  sum_.Add(dtype_, *rows_, absl::MakeConstSpan(positions_.data(), length), weights_.data(), length);
  output_.resize(group_ * head_dim_);
  for (size_t g = 0; g < group_; ++g) {
    for (size_t i = 0; i < head_dim_; ++i) {
      output_[g * head_dim_ + i] = sum_.value(g)[i] / totals_[g];
    }
  }
}

void WeightedSum::Reset(size_t group, size_t head_dim) {
  group_ = group;
  head_dim_ = head_dim;
  weight_.assign(group, 0.0);
  value_.assign(group * head_dim, 0.0);
  block_values_.resize(group * head_dim);
  block_weights_.resize(group * kBlockRows);
  pointers_.resize(kBlockRows);
  largest_.resize(group);
}

void WeightedSum::Add(gpu::DType dtype, const HeadRows& rows, absl::Span<const uint32_t> positions,
                      const double* weights, size_t stride) {
  for (size_t begin = 0; begin < positions.size(); begin += kBlockRows) {
    const size_t count = std::min(kBlockRows, positions.size() - begin);
    for (size_t i = 0; i < count; ++i) pointers_[i] = rows.Value(positions[begin + i]);
    for (size_t g = 0; g < group_; ++g) {
      const double* const block = weights + g * stride + begin;
      largest_[g] = *std::max_element(block, block + count);
      const double scale = largest_[g] > 0.0 ? 1.0 / largest_[g] : 0.0;
      for (size_t i = 0; i < count; ++i) {
        weight_[g] += block[i];
        block_weights_[g * kBlockRows + i] = static_cast<float>(block[i] * scale);
      }
    }
    std::fill(block_values_.begin(), block_values_.end(), 0.0f);
    gpu::host::AddWeightedRows(dtype, block_weights_.data(), kBlockRows, group_, pointers_.data(),
                               count, head_dim_, block_values_.data());
    for (size_t g = 0; g < group_; ++g) {
      for (size_t i = g * head_dim_; i < (g + 1) * head_dim_; ++i) {
        value_[i] += block_values_[i] * largest_[g];
      }
    }
  }
}

absl::Span<const double> WeightedSum::value(size_t g) const {
  return absl::MakeConstSpan(value_.data() + g * head_dim_, head_dim_);
}

}  // namespace clusterkv::client::replay
