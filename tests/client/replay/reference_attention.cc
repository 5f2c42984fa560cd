#include "tests/client/replay/reference_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "gpu/host/simd.h"

namespace clusterkv::client::replay {
namespace {

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// Indices in falling order; equal scores in rising index.
std::vector<uint32_t> Falling(const std::vector<double>& scores) {
  std::vector<uint32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return scores[a] > scores[b]; });
  return order;
}

}  // namespace

std::vector<double> Widen(gpu::DType dtype, const std::byte* source, size_t count) {
  std::vector<float> wide(count);
  gpu::host::ToFloat(dtype, source, wide.data(), count);
  return {wide.begin(), wide.end()};
}

std::vector<double> GroupSoftmax(const std::vector<std::vector<double>>& scores) {
  std::vector<double> sums(scores[0].size(), 0.0);
  for (const std::vector<double>& head : scores) {
    const double largest = *std::max_element(head.begin(), head.end());
    double total = 0.0;
    for (const double score : head) total += std::exp(score - largest);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += std::exp(head[i] - largest) / total;
  }
  return sums;
}

ReferenceStep::ReferenceStep(const Trace& trace, size_t layer, uint32_t kv_head, uint32_t step,
                             const StepRange& range)
    : range_(range) {
  const gpu::Shape& shape = trace.shape();
  const size_t row = trace.head_bytes();
  for (size_t i = 0; i < range.length(); ++i) {
    const size_t offset = i * trace.kv_token_bytes() + kv_head * row;
    keys_.push_back(Widen(shape.dtype, trace.layers()[layer].k + offset, shape.head_dim));
    values_.push_back(Widen(shape.dtype, trace.layers()[layer].v + offset, shape.head_dim));
  }
  for (uint32_t g = 0; g < shape.group_size(); ++g) {
    const size_t head = kv_head * shape.group_size() + g;
    const size_t offset = step * trace.q_step_bytes() + head * row;
    queries_.push_back(Widen(shape.dtype, trace.layers()[layer].q + offset, shape.head_dim));
    for (double& x : queries_.back()) x *= trace.softmax_scale();
    scores_.emplace_back();
    for (const auto& key : keys_) scores_.back().push_back(Dot(queries_.back(), key));
  }
}

std::vector<uint32_t> ReferenceStep::Window(uint32_t budget) const {
  std::vector<uint32_t> chosen;
  for (uint32_t p = range_.cut; p > range_.sinks && chosen.size() < budget;) chosen.push_back(--p);
  return chosen;
}

std::vector<uint32_t> ReferenceStep::Oracle(uint32_t budget) const {
  if (range_.candidates() == 0) return {};
  std::vector<std::vector<double>> candidates;
  for (const auto& head : scores_) {
    candidates.emplace_back(head.begin() + range_.sinks, head.begin() + range_.cut);
  }
  std::vector<uint32_t> chosen = Falling(GroupSoftmax(candidates));
  chosen.resize(std::min<size_t>(chosen.size(), budget));
  for (uint32_t& position : chosen) position += range_.sinks;
  return chosen;
}

std::vector<uint32_t> ReferenceStep::Quest(const std::string& rule, uint32_t budget) const {
  if (range_.candidates() == 0) return {};
  const uint32_t pages = (range_.candidates() + 15) / 16;
  std::vector<std::vector<double>> scores(group(), std::vector<double>(pages, 0.0));
  for (uint32_t page = 0; page < pages; ++page) {
    const uint32_t begin = range_.sinks + 16 * page;
    const uint32_t end = std::min(begin + 16, range_.cut);
    for (size_t c = 0; c < keys_[0].size(); ++c) {
      double lowest = keys_[begin][c];
      double highest = lowest;
      for (uint32_t p = begin; p < end; ++p) {
        lowest = std::min(lowest, keys_[p][c]);
        highest = std::max(highest, keys_[p][c]);
      }
      for (size_t g = 0; g < group(); ++g) {
        scores[g][page] += std::max(queries_[g][c] * lowest, queries_[g][c] * highest);
      }
    }
  }
  std::vector<double> shared = GroupSoftmax(scores);
  for (uint32_t page = 0; page < pages && rule != "softmax"; ++page) {
    double sum = 0.0;
    double largest = scores[0][page];
    for (const auto& head : scores) {
      sum += head[page];
      largest = std::max(largest, head[page]);
    }
    shared[page] = rule == "mean" ? sum / static_cast<double>(group()) : largest;
  }
  std::vector<uint32_t> chosen;
  for (const uint32_t page : Falling(shared)) {
    const uint32_t begin = range_.sinks + 16 * page;
    for (uint32_t p = begin; p < std::min(begin + 16, range_.cut); ++p) {
      if (chosen.size() < budget) chosen.push_back(p);
    }
  }
  return chosen;
}

double ReferenceStep::Recall(size_t g, const std::vector<uint32_t>& chosen) const {
  if (chosen.empty()) return 1.0;
  const std::vector<double> candidates(scores_[g].begin() + range_.sinks,
                                       scores_[g].begin() + range_.cut);
  const std::set<uint32_t> mine(chosen.begin(), chosen.end());
  const std::vector<uint32_t> order = Falling(candidates);
  double found = 0.0;
  for (size_t i = 0; i < chosen.size(); ++i) {
    if (mine.count(order[i] + range_.sinks) != 0) found += 1.0;
  }
  return found / static_cast<double>(chosen.size());
}

double ReferenceStep::Weight(size_t g, uint32_t position) const {
  const double largest = *std::max_element(scores_[g].begin(), scores_[g].end());
  return std::exp(scores_[g][position] - largest);
}

std::vector<uint32_t> ReferenceStep::Attended(const std::vector<uint32_t>& chosen) const {
  std::vector<uint32_t> positions = chosen;
  for (uint32_t p = 0; p < range_.length(); ++p) {
    if (p < range_.sinks || p >= range_.cut) positions.push_back(p);
  }
  return positions;
}

double ReferenceStep::Mass(size_t g, const std::vector<uint32_t>& chosen) const {
  double attended = 0.0;
  double total = 0.0;
  for (const uint32_t p : Attended(chosen)) attended += Weight(g, p);
  for (uint32_t p = 0; p < range_.length(); ++p) total += Weight(g, p);
  return attended / total;
}

std::vector<double> ReferenceStep::Weighted(size_t g,
                                            const std::vector<uint32_t>& positions) const {
  std::vector<double> output(values_[0].size(), 0.0);
  double total = 0.0;
  for (const uint32_t p : positions) {
    const double weight = Weight(g, p);
    total += weight;
    for (size_t c = 0; c < output.size(); ++c) output[c] += weight * values_[p][c];
  }
  for (double& x : output) x /= total;
  return output;
}

std::vector<double> ReferenceStep::Output(size_t g, const std::vector<uint32_t>& chosen) const {
  return Weighted(g, Attended(chosen));
}

std::vector<double> ReferenceStep::ExactOutput(size_t g) const {
  std::vector<uint32_t> all(range_.length());
  std::iota(all.begin(), all.end(), 0u);
  return Weighted(g, all);
}

double ReferenceStep::OutputError(size_t g, const std::vector<uint32_t>& chosen) const {
  const std::vector<double> exact = ExactOutput(g);
  const std::vector<double> output = Output(g, chosen);
  double difference = 0.0;
  for (size_t c = 0; c < exact.size(); ++c) {
    difference += (output[c] - exact[c]) * (output[c] - exact[c]);
  }
  return std::sqrt(difference / Dot(exact, exact));
}

}  // namespace clusterkv::client::replay
