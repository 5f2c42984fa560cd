#include "client/replay/evaluation.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/replay/baselines.h"
#include "client/replay/interrupt.h"
#include "client/replay/step_attention.h"

namespace clusterkv::client::replay {
namespace {

// Long enough that its pages are worth their making, short enough to balance threads.
constexpr uint32_t kStepsPerTask = 32;

constexpr gpu::GroupRule kQuestRules[] = {gpu::GroupRule::kSoftmax, gpu::GroupRule::kMean,
                                          gpu::GroupRule::kMax};

// Consecutive steps of one (layer, KV head).
struct Task {
  size_t layer = 0;
  uint32_t kv_head = 0;
  uint32_t step_begin = 0;
  uint32_t step_end = 0;
  std::vector<Measures> sums{};  // [kBaselineCount][budgets]
  absl::Status status{};
};

class TaskRunner {
 public:
  TaskRunner(const EvaluationRequest& request, Task& task, ExactTable& exact)
      : request_(request),
        task_(task),
        exact_(exact),
        rows_(*request.trace, task.layer, task.kv_head),
        pages_(*request.trace, task.layer, task.kv_head) {
    task.sums.resize(kBaselineCount * request.budgets.size());
  }

  void Run() {
    for (uint32_t step = task_.step_begin; step < task_.step_end && task_.status.ok(); ++step) {
      task_.status = CheckInterrupt();
      if (task_.status.ok()) RunStep(step);
      if (request_.advance) request_.advance(1);
    }
  }

 private:
  void RunStep(uint32_t step) {
    const Trace& trace = *request_.trace;
    const StepRange& range = request_.ranges[step];
    LoadQueries(trace, task_.layer, task_.kv_head, step, queries_);
    attention_.Compute(trace, rows_, queries_, range, ChosenCounts(request_.budgets, range));
    if (!attention_.finite()) {
      task_.status = absl::DataLossError(
          absl::StrCat(trace.path(), ": scores of layer ", trace.layers()[task_.layer].index,
                       ", KV head ", task_.kv_head, ", step ", step, " overflow fp32"));
      return;
    }
    const size_t group = trace.shape().group_size();
    if (request_.keep_exact) {
      StoreExact(attention_, exact_.Heads(task_.layer, step, task_.kv_head * group, group));
    }
    if (request_.baselines.empty()) return;
    meter_.SetStep(attention_);
    bool scored = false;
    for (const Baseline baseline : request_.baselines) {
      if (baseline <= Baseline::kQuestMax && !std::exchange(scored, true)) {
        pages_.Score(range, queries_);
      }
      Choose(baseline);
      const size_t budgets = request_.budgets.size();
      meter_.Measure(
          positions_,
          absl::MakeSpan(task_.sums).subspan(static_cast<size_t>(baseline) * budgets, budgets));
    }
  }

  void Choose(Baseline baseline) {
    const uint32_t count = attention_.counts().back();
    switch (baseline) {
      case Baseline::kQuestSoftmax:
      case Baseline::kQuestMean:
      case Baseline::kQuestMax:
        return pages_.Choose(kQuestRules[static_cast<size_t>(baseline)], count, positions_);
      case Baseline::kWindow:
        return ChooseWindow(attention_.range(), count, positions_);
      case Baseline::kOracle:
        return oracle_.Choose(attention_, positions_);
    }
  }

  const EvaluationRequest& request_;
  Task& task_;
  ExactTable& exact_;
  const HeadRows rows_;
  QuestPages pages_;
  OracleChooser oracle_;
  StepAttention attention_;
  PrefixMeter meter_;
  std::vector<float> queries_;
  std::vector<uint32_t> positions_;
};

std::vector<Task> MakeTasks(const EvaluationRequest& request) {
  const uint32_t steps = static_cast<uint32_t>(request.ranges.size());
  std::vector<Task> tasks;
  for (size_t layer = 0; layer < request.trace->layers().size(); ++layer) {
    for (uint32_t head = 0; head < request.trace->shape().kv_heads; ++head) {
      for (uint32_t begin = 0; begin < steps; begin += kStepsPerTask) {
        tasks.push_back({.layer = layer,
                         .kv_head = head,
                         .step_begin = begin,
                         .step_end = std::min(begin + kStepsPerTask, steps)});
      }
    }
  }
  return tasks;
}

}  // namespace

void ExactTable::Resize(size_t layers, size_t steps, size_t q_heads) {
  steps_ = steps;
  q_heads_ = q_heads;
  heads_.resize(layers * steps * q_heads);
}

absl::Span<ExactHead> ExactTable::Heads(size_t layer, size_t step, size_t first, size_t count) {
  return absl::MakeSpan(heads_).subspan(Index(layer, step, first), count);
}

absl::Span<const ExactHead> ExactTable::Heads(size_t layer, size_t step, size_t first,
                                              size_t count) const {
  return absl::MakeConstSpan(heads_).subspan(Index(layer, step, first), count);
}

absl::StatusOr<Evaluation> Evaluate(const EvaluationRequest& request,
                                    gpu::host::ThreadPool& threads) {
  const size_t layers = request.trace->layers().size();
  Evaluation evaluation;
  if (request.keep_exact) {
    evaluation.exact.Resize(layers, request.ranges.size(), request.trace->shape().q_heads);
  }
  std::vector<Task> tasks = MakeTasks(request);
  threads.ParallelFor(tasks.size(),
                      [&](size_t i) { TaskRunner(request, tasks[i], evaluation.exact).Run(); });
  evaluation.baselines.resize(kBaselineCount);
  for (const Baseline baseline : request.baselines) {
    evaluation.baselines[static_cast<size_t>(baseline)].assign(request.budgets.size(),
                                                               std::vector<Measures>(layers));
  }
  for (const Task& task : tasks) {
    if (!task.status.ok()) return task.status;
    for (const Baseline baseline : request.baselines) {
      const size_t row = static_cast<size_t>(baseline);
      for (size_t budget = 0; budget < request.budgets.size(); ++budget) {
        evaluation.baselines[row][budget][task.layer] +=
            task.sums[row * request.budgets.size() + budget];
      }
    }
  }
  return evaluation;
}

Baseline QuestBaseline(gpu::GroupRule rule) {
  switch (rule) {
    case gpu::GroupRule::kSoftmax:
      return Baseline::kQuestSoftmax;
    case gpu::GroupRule::kMean:
      return Baseline::kQuestMean;
    case gpu::GroupRule::kMax:
      return Baseline::kQuestMax;
  }
  return Baseline::kQuestSoftmax;
}

gpu::GroupRule BestQuestRule(const Evaluation& evaluation) {
  gpu::GroupRule best = kQuestRules[0];
  double lowest = std::numeric_limits<double>::infinity();
  for (const gpu::GroupRule rule : kQuestRules) {
    double sum = 0.0;  // as many rows for every rule
    for (const auto& layers : evaluation.baselines[static_cast<size_t>(QuestBaseline(rule))]) {
      for (const Measures& measures : layers) sum += measures.Mean().output_error;
    }
    if (sum < lowest) {
      lowest = sum;
      best = rule;
    }
  }
  return best;
}

}  // namespace clusterkv::client::replay
