// One pass over every (layer, KV head, step) of a trace: exact attention, the baselines' measures,
// and what measuring the service's own choices needs later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/replay/measures.h"
#include "client/replay/step_range.h"
#include "client/replay/trace.h"
#include "gpu/host/thread_pool.h"
#include "gpu/method_options.h"

namespace clusterkv::client::replay {

// Rules of the contract's table; Quest's three are one row of the report, chosen at the end.
enum class Baseline { kQuestSoftmax, kQuestMean, kQuestMax, kWindow, kOracle };
constexpr size_t kBaselineCount = 5;

struct EvaluationRequest {
  const Trace* trace = nullptr;
  std::vector<StepRange> ranges;  // of the steps that are replayed
  std::vector<uint32_t> budgets;  // rising, distinct; at most 64
  std::vector<Baseline> baselines;
  bool keep_exact = false;                // fills ExactTable
  std::function<void(uint64_t)> advance;  // (layer, KV head, step) triples done; any thread
};

// [layers][steps][q_heads]
class ExactTable {
 public:
  void Resize(size_t layers, size_t steps, size_t q_heads);
  absl::Span<ExactHead> Heads(size_t layer, size_t step, size_t first, size_t count);
  absl::Span<const ExactHead> Heads(size_t layer, size_t step, size_t first, size_t count) const;

 private:
  size_t Index(size_t layer, size_t step, size_t q_head) const {
    return (layer * steps_ + step) * q_heads_ + q_head;
  }

  size_t steps_ = 0;
  size_t q_heads_ = 0;
  std::vector<ExactHead> heads_;
};

struct Evaluation {
  // Sums over steps and query heads: [baseline][budget][layer]; empty for those not asked for.
  std::vector<std::vector<std::vector<Measures>>> baselines;
  ExactTable exact;

  const Measures& At(Baseline baseline, size_t budget, size_t layer) const {
    return baselines[static_cast<size_t>(baseline)][budget][layer];
  }
};

// The result does not depend on the number of threads. Errors: DATA_LOSS where scores
// overflow fp32; CANCELLED when `advance` finds the run interrupted.
absl::StatusOr<Evaluation> Evaluate(const EvaluationRequest& request,
                                    gpu::host::ThreadPool& threads);

// Quest's rule with the lowest output error, averaged over layers and budgets; the first of equals.
gpu::GroupRule BestQuestRule(const Evaluation& evaluation);
Baseline QuestBaseline(gpu::GroupRule rule);

}  // namespace clusterkv::client::replay
