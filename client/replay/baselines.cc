#include "client/replay/baselines.h"

#include <algorithm>
#include <cmath>

#include "gpu/host/simd.h"

namespace clusterkv::client::replay {

void ChooseWindow(const StepRange& range, uint32_t count, std::vector<uint32_t>& positions) {
  positions.clear();
  for (uint32_t i = 0; i < count; ++i) positions.push_back(range.cut - 1 - i);
}

void OracleChooser::Choose(const StepAttention& step, std::vector<uint32_t>& positions) {
  const StepRange& range = step.range();
  const uint32_t candidates = range.candidates();
  ranked_.resize(candidates);
  for (uint32_t i = 0; i < candidates; ++i) ranked_[i] = {0.0, i};
  for (size_t g = 0; candidates != 0 && g < step.group(); ++g) {
    // Weights are relative to the largest of all scores; double keeps those far below it apart.
    const double* const weight = step.weights(g).data() + range.sinks;
    double total = 0.0;
    for (uint32_t i = 0; i < candidates; ++i) total += weight[i];
    const double factor = total > 0.0 ? 1.0 / total : 0.0;
    for (uint32_t i = 0; i < candidates; ++i) ranked_[i].score += weight[i] * factor;
  }
  RankPrefixes(absl::MakeSpan(ranked_), step.counts());
  positions.clear();
  const uint32_t count = step.counts().empty() ? 0 : step.counts().back();
  for (uint32_t i = 0; i < count; ++i) positions.push_back(range.sinks + ranked_[i].index);
}

QuestPages::QuestPages(const Trace& trace, size_t layer, uint32_t kv_head)
    : rows_(trace, layer, kv_head),
      dtype_(trace.shape().dtype),
      group_(trace.shape().group_size()),
      head_dim_(trace.shape().head_dim),
      tail_(2 * head_dim_),
      key_(head_dim_),
      signed_queries_(group_ * 2 * head_dim_) {}

void QuestPages::Bound(uint32_t begin, uint32_t end, float* row) {
  float* const highest = row;
  float* const lowest = row + head_dim_;
  for (uint32_t position = begin; position < end; ++position) {
    gpu::host::ToFloat(dtype_, rows_.Key(position), key_.data(), head_dim_);
    if (position == begin) {
      std::copy(key_.begin(), key_.end(), highest);
      std::copy(key_.begin(), key_.end(), lowest);
      continue;
    }
    for (size_t i = 0; i < head_dim_; ++i) {
      highest[i] = std::max(highest[i], key_[i]);
      lowest[i] = std::min(lowest[i], key_[i]);
    }
  }
}

void QuestPages::Extend(const StepRange& range) {
  const uint32_t full = range.candidates() / kPageTokens;
  const size_t width = 2 * head_dim_;
  if (bounds_.size() < full * width) bounds_.resize(full * width);
  for (; full_pages_ < full; ++full_pages_) {
    const uint32_t begin = range.sinks + full_pages_ * kPageTokens;
    Bound(begin, begin + kPageTokens, bounds_.data() + full_pages_ * width);
  }
  const uint32_t tail_begin = range.sinks + full * kPageTokens;
  if (tail_begin < range.cut && tail_cut_ != range.cut) {
    Bound(tail_begin, range.cut, tail_.data());
    tail_cut_ = range.cut;
  }
  pages_ = full + (tail_begin < range.cut ? 1 : 0);
  pointers_.clear();
  for (size_t page = 0; page < full; ++page) {
    pointers_.push_back(reinterpret_cast<const std::byte*>(bounds_.data() + page * width));
  }
  if (pages_ > full) pointers_.push_back(reinterpret_cast<const std::byte*>(tail_.data()));
}

void QuestPages::Score(const StepRange& range, absl::Span<const float> queries) {
  range_ = range;
  Extend(range);
  const size_t width = 2 * head_dim_;
  for (size_t g = 0; g < group_; ++g) {
    float* const row = signed_queries_.data() + g * width;
    for (size_t i = 0; i < head_dim_; ++i) {
      const float q = queries[g * head_dim_ + i];
      row[i] = std::max(q, 0.0f);
      row[head_dim_ + i] = std::min(q, 0.0f);
    }
  }
  scores_.resize(group_ * pages_);
  weights_.resize(group_ * pages_);
  gpu::host::DotGroup(gpu::DType::kFp32, signed_queries_.data(), group_, pointers_.data(), pages_,
                      width, scores_.data(), pages_);
  for (size_t g = 0; g < group_; ++g) {
    const float* const score = scores_.data() + g * pages_;
    double* const weight = weights_.data() + g * pages_;
    const double largest = gpu::host::Max(score, pages_);
    double total = 0.0;
    for (size_t page = 0; page < pages_; ++page) {
      weight[page] = std::exp(score[page] - largest);
      total += weight[page];
    }
    for (size_t page = 0; page < pages_; ++page) weight[page] /= total;
  }
}

double QuestPages::GroupScore(gpu::GroupRule rule, size_t page) const {
  double sum = 0.0;
  double largest = scores_[page];
  for (size_t g = 0; g < group_; ++g) {
    sum +=
        rule == gpu::GroupRule::kSoftmax ? weights_[g * pages_ + page] : scores_[g * pages_ + page];
    largest = std::max<double>(largest, scores_[g * pages_ + page]);
  }
  // The mean of the scores ranks as their sum does.
  return rule == gpu::GroupRule::kMax ? largest : sum;
}

void QuestPages::Choose(gpu::GroupRule rule, uint32_t count, std::vector<uint32_t>& positions) {
  ranked_.resize(pages_);
  for (uint32_t page = 0; page < pages_; ++page) ranked_[page] = {GroupScore(rule, page), page};
  // The last page may be short.
  const size_t needed = std::min<size_t>(pages_, count / kPageTokens + 2);
  std::partial_sort(ranked_.begin(), ranked_.begin() + static_cast<ptrdiff_t>(needed),
                    ranked_.end(), RanksBefore);
  positions.clear();
  for (const Ranked& page : ranked_) {
    const uint32_t begin = range_.sinks + page.index * kPageTokens;
    const uint32_t end = std::min(begin + kPageTokens, range_.cut);
    for (uint32_t i = begin; i < end && positions.size() < count; ++i) positions.push_back(i);
    if (positions.size() == count) break;
  }
}

}  // namespace clusterkv::client::replay
