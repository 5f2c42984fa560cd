// The contract's definitions once more, in double and by plain loops, for the tests to compare
// with.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client/replay/step_range.h"
#include "client/replay/trace.h"

namespace clusterkv::client::replay {

// One step of one (layer, KV head).
class ReferenceStep {
 public:
  ReferenceStep(const Trace& trace, size_t layer, uint32_t kv_head, uint32_t step,
                const StepRange& range);

  // Token positions, highest ranked first, of min(budget, candidates).
  std::vector<uint32_t> Window(uint32_t budget) const;
  std::vector<uint32_t> Oracle(uint32_t budget) const;
  // `rule`: "softmax", "mean" or "max".
  std::vector<uint32_t> Quest(const std::string& rule, uint32_t budget) const;

  // Of query head g of the group, for a choice.
  double Recall(size_t g, const std::vector<uint32_t>& chosen) const;
  double Mass(size_t g, const std::vector<uint32_t>& chosen) const;
  std::vector<double> Output(size_t g, const std::vector<uint32_t>& chosen) const;
  double OutputError(size_t g, const std::vector<uint32_t>& chosen) const;
  std::vector<double> ExactOutput(size_t g) const;

  size_t group() const { return scores_.size(); }

 private:
  std::vector<uint32_t> Attended(const std::vector<uint32_t>& chosen) const;
  std::vector<double> Weighted(size_t g, const std::vector<uint32_t>& positions) const;
  double Weight(size_t g, uint32_t position) const;

  StepRange range_;
  std::vector<std::vector<double>> keys_, values_;  // [length][head_dim]
  std::vector<std::vector<double>> queries_;        // [group][head_dim], scaled
  std::vector<std::vector<double>> scores_;         // [group][length]
};

// Widens `count` storage elements.
std::vector<double> Widen(gpu::DType dtype, const std::byte* source, size_t count);

// Sum over the group of each head's softmax over the items.
std::vector<double> GroupSoftmax(const std::vector<std::vector<double>>& scores);

}  // namespace clusterkv::client::replay
