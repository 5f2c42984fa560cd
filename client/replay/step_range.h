// Who may be selected at a step, by the contract's schedule: pure arithmetic.
//
//   0      sinks          cut                 position
//   |------|= candidates =|-- window ---------|
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gpu/method_options.h"

namespace clusterkv::client::replay {

// Positions in tokens. The step's own token, at `position`, is part of the window (or of the sinks,
// in a sequence that is no longer than they).
struct StepRange {
  uint32_t sinks = 0;
  uint32_t cut = 0;  // never below sinks
  uint32_t position = 0;

  uint32_t length() const { return position + 1; }
  uint32_t candidates() const { return cut - sinks; }
  uint32_t sink_end() const { return std::min(sinks, length()); }
  uint32_t window_begin() const { return std::min(cut, length()); }
  uint32_t window_tokens() const { return length() - window_begin(); }
  bool operator==(const StepRange&) const = default;
};

// One for each of the first `steps` decode steps: cut is max(sinks, prompt - min_window) at first;
// then, while prompt + t - cut >= min_window + decode_segment, the next decode_segment tokens are
// clustered.
std::vector<StepRange> StepRanges(const gpu::MethodOptions& method, uint32_t prompt_tokens,
                                  uint32_t steps);

// min(budget, candidates) of each budget.
std::vector<uint32_t> ChosenCounts(const std::vector<uint32_t>& budgets, const StepRange& range);

}  // namespace clusterkv::client::replay
