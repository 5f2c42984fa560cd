#include "client/replay/evaluation.h"

#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <utility>

#include "tests/client/replay/random_trace.h"
#include "tests/client/replay/reference_attention.h"

namespace clusterkv::client::replay {
namespace {

const std::vector<Baseline> kAll = {Baseline::kQuestSoftmax, Baseline::kQuestMean,
                                    Baseline::kQuestMax, Baseline::kWindow, Baseline::kOracle};

std::vector<uint32_t> ReferenceChoice(const ReferenceStep& step, Baseline baseline,
                                      uint32_t budget) {
  switch (baseline) {
    case Baseline::kQuestSoftmax:
      return step.Quest("softmax", budget);
    case Baseline::kQuestMean:
      return step.Quest("mean", budget);
    case Baseline::kQuestMax:
      return step.Quest("max", budget);
    case Baseline::kWindow:
      return step.Window(budget);
    case Baseline::kOracle:
      return step.Oracle(budget);
  }
  return {};
}

Measures ReferenceMean(const EvaluationRequest& request, Baseline baseline, uint32_t budget,
                       size_t layer) {
  const Trace& trace = *request.trace;
  Measures sum;
  for (uint32_t step = 0; step < request.ranges.size(); ++step) {
    for (uint32_t head = 0; head < trace.shape().kv_heads; ++head) {
      const ReferenceStep reference(trace, layer, head, step, request.ranges[step]);
      const std::vector<uint32_t> chosen = ReferenceChoice(reference, baseline, budget);
      for (size_t g = 0; g < reference.group(); ++g) {
        sum += {reference.Recall(g, chosen), reference.OutputError(g, chosen),
                reference.Mass(g, chosen), 1};
      }
    }
  }
  return sum.Mean();
}

struct Case {
  std::string name;
  uint32_t sinks = 0, min_window = 0, decode_segment = 0;
  std::vector<uint32_t> budgets;
  RandomTraceOptions trace = {};
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, uint32_t sinks, uint32_t min_window, uint32_t segment,
                       std::vector<uint32_t> budgets) -> RandomTraceOptions& {
    cases.push_back({name, sinks, min_window, segment, std::move(budgets), {}});
    return cases.back().trace;
  };
  const auto size = [](RandomTraceOptions& trace, uint32_t prompt, uint32_t steps) {
    trace.prompt_tokens = prompt;
    trace.steps = steps;
  };
  const auto heads = [](RandomTraceOptions& trace, uint32_t kv, uint32_t q, uint32_t dim,
                        gpu::DType dtype) {
    trace.kv_heads = kv;
    trace.q_heads = q;
    trace.head_dim = dim;
    trace.dtype = dtype;
  };
  size(add("Grouped", 5, 6, 9, {8, 40, 100}), 120, 36);
  RandomTraceOptions& sharp = add("Sharp", 4, 0, 10, {16, 32});
  size(sharp, 90, 20);
  sharp.spread = 12.0f;
  RandomTraceOptions& alone = add("OneHeadEach", 16, 8, 4, {20});
  size(alone, 60, 10);
  heads(alone, 3, 3, 64, gpu::DType::kFp32);
  size(add("BudgetAboveAll", 2, 3, 4, {1000}), 40, 10);
  size(add("NoSinks", 0, 0, 2, {7, 24}), 50, 6);
  size(add("BelowSinks", 16, 4, 8, {8, 16}), 3, 40);
  RandomTraceOptions& wide = add("Wide", 4, 4, 8, {16});
  size(wide, 50, 4);
  heads(wide, 1, 7, 96, gpu::DType::kBf16);
  RandomTraceOptions& longer = add("Long", 16, 32, 64, {64, 300});
  size(longer, 700, 3);
  heads(longer, 1, 2, 128, gpu::DType::kFp16);
  return cases;
}

class EvaluationTest : public testing::TestWithParam<Case> {};

TEST_P(EvaluationTest, AgreesWithTheDefinitions) {
  const TemporaryDirectory directory;
  const Trace trace = MakeRandomTrace(directory, GetParam().trace);
  gpu::MethodOptions method;
  method.sink_tokens = GetParam().sinks;
  method.min_window_tokens = GetParam().min_window;
  method.decode_segment_tokens = GetParam().decode_segment;
  EvaluationRequest request;
  request.trace = &trace;
  request.ranges = StepRanges(method, trace.prompt_tokens(), trace.steps());
  request.budgets = GetParam().budgets;
  request.baselines = kAll;
  gpu::host::ThreadPool threads(2);
  const absl::StatusOr<Evaluation> evaluation = Evaluate(request, threads);
  ASSERT_TRUE(evaluation.ok()) << evaluation.status();
  for (const Baseline baseline : kAll) {
    for (size_t budget = 0; budget < request.budgets.size(); ++budget) {
      for (size_t layer = 0; layer < trace.layers().size(); ++layer) {
        SCOPED_TRACE(testing::Message() << "baseline " << static_cast<int>(baseline) << ", budget "
                                        << request.budgets[budget] << ", layer " << layer);
        const Measures mean = evaluation->At(baseline, budget, layer).Mean();
        const Measures expected = ReferenceMean(request, baseline, request.budgets[budget], layer);
        EXPECT_NEAR(mean.recall, expected.recall, 1e-9);
        EXPECT_NEAR(mean.output_error, expected.output_error, 2e-6);
        EXPECT_NEAR(mean.mass, expected.mass, 2e-6);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, EvaluationTest, testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

class EvaluationOfSmallTrace : public testing::Test {
 protected:
  EvaluationOfSmallTrace() : trace_(MakeRandomTrace(directory_, {})) {
    request_.trace = &trace_;
    request_.ranges = StepRanges(gpu::MethodOptions{}, trace_.prompt_tokens(), trace_.steps());
    request_.budgets = {16, 64};
    request_.baselines = kAll;
  }

  TemporaryDirectory directory_;
  Trace trace_;
  EvaluationRequest request_;
};

TEST_F(EvaluationOfSmallTrace, DoesNotDependOnThreads) {
  gpu::host::ThreadPool one(1);
  gpu::host::ThreadPool many(7);
  const auto a = Evaluate(request_, one);
  const auto b = Evaluate(request_, many);
  ASSERT_TRUE(a.ok() && b.ok());
  for (const Baseline baseline : kAll) {
    EXPECT_EQ(a->At(baseline, 1, 0).recall, b->At(baseline, 1, 0).recall);
    EXPECT_EQ(a->At(baseline, 1, 0).output_error, b->At(baseline, 1, 0).output_error);
    EXPECT_EQ(a->At(baseline, 1, 0).mass, b->At(baseline, 1, 0).mass);
  }
}

TEST_F(EvaluationOfSmallTrace, AdvancesOnceForEveryStepAndHead) {
  std::atomic<uint64_t> done = 0;
  request_.advance = [&](uint64_t count) { done += count; };
  gpu::host::ThreadPool threads(2);
  ASSERT_TRUE(Evaluate(request_, threads).ok());
  EXPECT_EQ(done, uint64_t{trace_.steps()} * trace_.shape().problems());
}

TEST(Evaluation, ReportsScoresThatOverflow) {
  const TemporaryDirectory directory;
  const Trace trace = MakeRandomTrace(
      directory, {.prompt_tokens = 10, .steps = 2, .spread = 1e20f, .key_spread = 1e20f});
  EvaluationRequest request;
  request.trace = &trace;
  request.ranges = StepRanges(gpu::MethodOptions{}, 10, 2);
  request.budgets = {4};
  gpu::host::ThreadPool threads(1);
  EXPECT_FALSE(Evaluate(request, threads).ok());
}

TEST(Evaluation, TakesTheQuestRuleOfLowestErrorAndTheFirstOfEquals) {
  Evaluation evaluation;
  evaluation.baselines.assign(kBaselineCount, {{Measures{0, 2.0, 0, 4}, Measures{0, 1.0, 0, 4}}});
  EXPECT_EQ(BestQuestRule(evaluation), gpu::GroupRule::kSoftmax);
  evaluation.baselines[static_cast<size_t>(Baseline::kQuestMax)][0][1].output_error = 0.5;
  EXPECT_EQ(BestQuestRule(evaluation), gpu::GroupRule::kMax);
}

}  // namespace
}  // namespace clusterkv::client::replay
