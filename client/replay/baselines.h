// What the baselines choose at a step: quest, window and oracle, by the contract's table. Every
// choice is a list of token positions of which the first n are the choice for n tokens, so that one
// list serves all budgets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "client/replay/ranking.h"
#include "client/replay/step_attention.h"
#include "client/replay/step_range.h"
#include "gpu/method_options.h"

namespace clusterkv::client::replay {

// The newest candidates. `positions` is what the others write, too: `count` of them.
void ChooseWindow(const StepRange& range, uint32_t count, std::vector<uint32_t>& positions);

// Candidates by group score of q·k. Only the prefixes of step.counts() are ordered.
class OracleChooser {
 public:
  void Choose(const StepAttention& step, std::vector<uint32_t>& positions);

 private:
  std::vector<Ranked> ranked_;
};

// Quest (arXiv 2406.10774): pages of 16 consecutive candidates, bounded per channel by the minimum
// and maximum of their keys.
//
//   page row  [max_0 .. max_d-1 | min_0 .. min_d-1]
//   query row [max(q, 0)        | min(q, 0)       ]     their dot product is the page's score
//
// A full page is the same at every step; the last one ends at the cut, so there is one for each cut
// that is not on a page's end. One thread at a time.
class QuestPages {
 public:
  static constexpr uint32_t kPageTokens = 16;

  QuestPages(const Trace& trace, size_t layer, uint32_t kv_head);

  // Scores all pages of candidates; `queries` scaled, [group][head_dim].
  void Score(const StepRange& range, absl::Span<const float> queries);
  // Pages in falling order of the group's score, of the last one its first tokens that fit.
  void Choose(gpu::GroupRule rule, uint32_t count, std::vector<uint32_t>& positions);

 private:
  void Extend(const StepRange& range);
  void Bound(uint32_t begin, uint32_t end, float* row);
  double GroupScore(gpu::GroupRule rule, size_t page) const;

  const HeadRows rows_;
  const gpu::DType dtype_;
  const size_t group_;
  const size_t head_dim_;
  uint32_t full_pages_ = 0;
  StepRange range_;
  std::vector<float> bounds_;  // [full pages][2 * head_dim]
  std::vector<float> tail_;    // [2 * head_dim]; of the tokens from the last full page to the cut
  uint32_t tail_cut_ = 0;      // that tail_ is for; 0 = none
  std::vector<float> key_;
  std::vector<float> signed_queries_;  // [group][2 * head_dim]
  std::vector<const std::byte*> pointers_;
  size_t pages_ = 0;
  std::vector<float> scores_;    // [group][pages]
  std::vector<double> weights_;  // [group][pages]: softmax over the pages
  std::vector<Ranked> ranked_;
};

}  // namespace clusterkv::client::replay
