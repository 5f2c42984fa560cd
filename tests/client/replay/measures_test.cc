#include "client/replay/measures.h"

#include <gtest/gtest.h>

#include "client/replay/service_totals.h"
#include "tests/client/replay/random_trace.h"
#include "tests/client/replay/reference_attention.h"

namespace clusterkv::client::replay {
namespace {

TEST(RelativeError, OfZeroOutputIsZeroOrOne) {
  const std::vector<double> zero = {0.0, 0.0};
  EXPECT_EQ(RelativeError(std::vector<float>{0.0f, 0.0f}, zero), 0.0);
  EXPECT_EQ(RelativeError(std::vector<float>{0.0f, 1e-9f}, zero), 1.0);
}

TEST(RelativeError, IsARatioOfNorms) {
  EXPECT_DOUBLE_EQ(RelativeError(std::vector<float>{3.0f, 4.0f}, std::vector<double>{0.0, 8.0}),
                   5.0 / 8.0);
}

TEST(Measures, MeanOfNothingIsZero) {
  EXPECT_EQ(Measures().Mean().recall, 0.0);
  const Measures mean = Measures{2.0, 4.0, 6.0, 2}.Mean();
  EXPECT_EQ(mean.recall, 1.0);
  EXPECT_EQ(mean.output_error, 2.0);
  EXPECT_EQ(mean.mass, 3.0);
}

TEST(ChoiceMeter, AgreesWithTheDefinitions) {
  const TemporaryDirectory directory;
  const Trace trace = MakeRandomTrace(directory, {.dtype = gpu::DType::kFp16, .spread = 3.0f});
  const std::vector<uint32_t> counts = {3, 30};
  const StepRange range{.sinks = 8, .cut = 120, .position = 155};
  constexpr uint32_t kStep = 5;
  const HeadRows rows(trace, 1, 1);
  std::vector<float> queries;
  LoadQueries(trace, 1, 1, kStep, queries);
  StepAttention attention;
  attention.Compute(trace, rows, queries, range, counts);
  std::vector<ExactHead> exact(2);
  StoreExact(attention, absl::MakeSpan(exact));

  const ReferenceStep reference(trace, 1, 1, kStep, range);
  for (size_t index = 0; index < counts.size(); ++index) {
    // The reference's choice, and what attending to it gives: outputs that are exactly right.
    const std::vector<uint32_t> chosen = reference.Quest("max", counts[index]);
    std::vector<float> outputs;
    Measures expected;
    for (size_t g = 0; g < reference.group(); ++g) {
      const std::vector<double> output = reference.Output(g, chosen);
      outputs.insert(outputs.end(), output.begin(), output.end());
      expected += {reference.Recall(g, chosen), reference.OutputError(g, chosen),
                   reference.Mass(g, chosen), 1};
    }
    Measures sum;
    ChoiceMeter().Measure(trace, rows, queries, range, exact,
                          std::vector<int32_t>(chosen.begin(), chosen.end()), index, outputs, sum);
    EXPECT_EQ(sum.count, 2u);
    EXPECT_NEAR(sum.recall, expected.recall, 1e-9);
    EXPECT_NEAR(sum.output_error, expected.output_error, 2e-6);
    EXPECT_NEAR(sum.mass, expected.mass, 2e-6);
  }
}

TEST(ChoiceMeter, CountsNoCandidatesAsFullRecall) {
  const TemporaryDirectory directory;
  const Trace trace = MakeRandomTrace(directory, {.prompt_tokens = 4, .steps = 2});
  const StepRange range{.sinks = 16, .cut = 16, .position = 5};
  const HeadRows rows(trace, 0, 0);
  std::vector<float> queries;
  LoadQueries(trace, 0, 0, 1, queries);
  StepAttention attention;
  const std::vector<uint32_t> counts = {0};
  attention.Compute(trace, rows, queries, range, counts);
  std::vector<ExactHead> exact(2);
  StoreExact(attention, absl::MakeSpan(exact));
  std::vector<float> outputs = exact[0].output;
  outputs.insert(outputs.end(), exact[1].output.begin(), exact[1].output.end());
  Measures sum;
  ChoiceMeter().Measure(trace, rows, queries, range, exact, {}, 0, outputs, sum);
  EXPECT_EQ(sum.recall, 2.0);
  EXPECT_NEAR(sum.mass, 2.0, 1e-6);
  EXPECT_EQ(sum.output_error, 0.0);
}

TEST(ServiceTotals, SurviveTheWayThroughJson) {
  ServiceTotals totals;
  totals.backend = "host";
  totals.budgets = {{LayerTotals{{0.1, 0.2, 0.3, 4}, 5, 6, 7, 8, 9, 10}, LayerTotals{}}};
  const auto back = ServiceTotalsFromJson(nlohmann::json::parse(ToJson(totals).dump()), 1, 2);
  ASSERT_TRUE(back.ok()) << back.status();
  const LayerTotals& layer = back->budgets[0][0];
  EXPECT_EQ(back->backend, "host");
  EXPECT_EQ(layer.measures.recall, 0.1);
  EXPECT_EQ(layer.measures.count, 4u);
  EXPECT_EQ(layer.hit_clusters, 5u);
  EXPECT_EQ(layer.steps, 10u);
  EXPECT_EQ(layer.HitRate(), 5.0 / 11.0);
  EXPECT_EQ(layer.HostBytesPerStep(), 0.7);
  EXPECT_FALSE(ServiceTotalsFromJson(ToJson(totals), 1, 3).ok());
  EXPECT_FALSE(ServiceTotalsFromJson(ToJson(totals), 2, 2).ok());
  EXPECT_FALSE(ServiceTotalsFromJson(nlohmann::json::array(), 1, 2).ok());
}

TEST(ServiceTotals, NothingSelectedIsNothingMissed) { EXPECT_EQ(LayerTotals().HitRate(), 1.0); }

}  // namespace
}  // namespace clusterkv::client::replay
