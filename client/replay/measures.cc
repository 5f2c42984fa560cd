#include "client/replay/measures.h"

#include <cmath>

#include "gpu/host/simd.h"

namespace clusterkv::client::replay {

Measures& Measures::operator+=(const Measures& other) {
  recall += other.recall;
  output_error += other.output_error;
  mass += other.mass;
  count += other.count;
  return *this;
}

Measures Measures::Mean() const {
  if (count == 0) return {};
  const double n = static_cast<double>(count);
  return {recall / n, output_error / n, mass / n, 1};
}

double RelativeError(absl::Span<const float> output, absl::Span<const double> exact) {
  double difference = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double d = output[i] - exact[i];
    difference += d * d;
    norm += exact[i] * exact[i];
  }
  if (norm == 0.0) return difference == 0.0 ? 0.0 : 1.0;
  return std::sqrt(difference / norm);
}

void PrefixMeter::SetStep(const StepAttention& step) {
  step_ = &step;
  const StepRange& range = step.range();
  positions_.clear();
  for (uint32_t i = 0; i < range.sink_end(); ++i) positions_.push_back(i);
  for (uint32_t i = range.window_begin(); i < range.length(); ++i) positions_.push_back(i);
  weights_.clear();
  for (size_t g = 0; g < step.group(); ++g) {
    for (const uint32_t position : positions_) weights_.push_back(step.weights(g)[position]);
  }
  always_.Reset(step.group(), step.head_dim());
  always_.Add(step.dtype(), step.rows(), positions_, weights_.data(), positions_.size());
}

void PrefixMeter::Measure(absl::Span<const uint32_t> positions, absl::Span<Measures> sums) {
  const size_t group = step_->group();
  sum_ = always_;
  output_.resize(step_->head_dim());
  uint32_t begin = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const auto added = positions.subspan(begin, step_->counts()[i] - begin);
    begin = step_->counts()[i];
    weights_.clear();
    for (size_t g = 0; g < group; ++g) {
      const double* const weight = step_->weights(g).data();
      for (const uint32_t position : added) weights_.push_back(weight[position]);
    }
    sum_.Add(step_->dtype(), step_->rows(), added, weights_.data(), added.size());
    for (size_t g = 0; g < group; ++g) {
      const double total = sum_.weight(g);
      for (size_t c = 0; c < output_.size(); ++c) {
        output_[c] = static_cast<float>(sum_.value(g)[c] / total);
      }
      sums[i].output_error += RelativeError(output_, step_->output(g));
      sums[i].mass += total / step_->total_weight(g);
      ++sums[i].count;
    }
  }
  AddRecall(positions, sums);
}

void PrefixMeter::AddRecall(absl::Span<const uint32_t> positions, absl::Span<Measures> sums) {
  const absl::Span<const uint32_t> counts = step_->counts();
  const uint32_t sinks = step_->range().sinks;
  for (size_t g = 0; g < step_->group(); ++g) {
    const OwnTop& own = step_->own_top(g);
    // A token counts from the first prefix on that holds it and whose own top holds it, too.
    found_.assign(counts.size() + 1, 0);
    uint32_t next = 0;
    for (size_t prefix = 0; prefix < counts.size(); ++prefix) {
      for (; next < counts[prefix]; ++next) {
        ++found_[std::max<size_t>(prefix, own.level(positions[next] - sinks))];
      }
    }
    uint64_t found = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      found += found_[i];
      sums[i].recall +=
          counts[i] == 0 ? 1.0 : static_cast<double>(found) / static_cast<double>(counts[i]);
    }
  }
}

void StoreExact(const StepAttention& step, absl::Span<ExactHead> heads) {
  for (size_t g = 0; g < step.group(); ++g) {
    ExactHead& head = heads[g];
    head.output.assign(step.output(g).begin(), step.output(g).end());
    head.largest = step.largest(g);
    head.total_weight = step.total_weight(g);
    head.last_own_top = step.own_top(g).last();
  }
}

void ChoiceMeter::Measure(const Trace& trace, const HeadRows& rows, absl::Span<const float> queries,
                          const StepRange& range, absl::Span<const ExactHead> heads,
                          absl::Span<const int32_t> positions, size_t count_index,
                          absl::Span<const float> outputs, Measures& sum) {
  const size_t dim = trace.shape().head_dim;
  keys_.clear();
  for (const int32_t position : positions) keys_.push_back(rows.Key(static_cast<size_t>(position)));
  for (uint32_t i = 0; i < range.sink_end(); ++i) keys_.push_back(rows.Key(i));
  for (uint32_t i = range.window_begin(); i < range.length(); ++i) keys_.push_back(rows.Key(i));
  scores_.resize(heads.size() * keys_.size());
  gpu::host::DotGroup(trace.shape().dtype, queries.data(), heads.size(), keys_.data(), keys_.size(),
                      dim, scores_.data(), keys_.size());
  for (size_t g = 0; g < heads.size(); ++g) {
    const ExactHead& exact = heads[g];
    const float* const score = scores_.data() + g * keys_.size();
    double weight = 0.0;
    for (size_t i = 0; i < keys_.size(); ++i) weight += std::exp(score[i] - exact.largest);
    const Ranked& last = exact.last_own_top[count_index];
    uint64_t found = 0;
    for (size_t i = 0; i < positions.size(); ++i) {
      const Ranked item{score[i], static_cast<uint32_t>(positions[i]) - range.sinks};
      if (!RanksBefore(last, item)) ++found;
    }
    exact_.assign(exact.output.begin(), exact.output.end());
    sum.recall += positions.empty()
                      ? 1.0
                      : static_cast<double>(found) / static_cast<double>(positions.size());
    sum.output_error += RelativeError(outputs.subspan(g * dim, dim), exact_);
    sum.mass += weight / exact.total_weight;
    ++sum.count;
  }
}

}  // namespace clusterkv::client::replay
