#include "client/replay/step_range.h"

namespace clusterkv::client::replay {

std::vector<StepRange> StepRanges(const gpu::MethodOptions& method, uint32_t prompt_tokens,
                                  uint32_t steps) {
  const uint32_t before_window = prompt_tokens - std::min(prompt_tokens, method.min_window_tokens);
  const uint64_t due = uint64_t{method.min_window_tokens} + method.decode_segment_tokens;
  StepRange range{.sinks = method.sink_tokens, .cut = std::max(method.sink_tokens, before_window)};
  std::vector<StepRange> ranges;
  ranges.reserve(steps);
  for (uint32_t step = 0; step < steps; ++step) {
    range.position = prompt_tokens + step;
    while (range.position >= range.cut + due) range.cut += method.decode_segment_tokens;
    ranges.push_back(range);
  }
  return ranges;
}

std::vector<uint32_t> ChosenCounts(const std::vector<uint32_t>& budgets, const StepRange& range) {
  std::vector<uint32_t> counts;
  counts.reserve(budgets.size());
  for (const uint32_t budget : budgets) counts.push_back(std::min(budget, range.candidates()));
  return counts;
}

}  // namespace clusterkv::client::replay
