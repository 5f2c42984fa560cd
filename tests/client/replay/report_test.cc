#include "client/replay/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"
#include "tests/client/replay/random_trace.h"

namespace clusterkv::client::replay {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ReportTest : public testing::Test {
 protected:
  ReportTest() : trace_(MakeRandomTrace(directory_, {})) {
    options_.trace = "some/trace.safetensors";
    options_.methods = {Method::kClusterkv, Method::kQuest};
    options_.budgets = {64, 32};
    options_.preset = "default";
    options_.steps = 2;
    options_.seed = 18446744073709551615u;
    ranges_ = {{4, 100, 150}, {4, 110, 151}};
    // [budget, rising][layer]: 32, then 64.
    service_.backend = "host";
    service_.budgets = {{Totals(0.25, 1, 1), Totals(0.75, 3, 1)},
                        {Totals(0.5, 1, 3), Totals(0.5, 2, 2)}};
    evaluation_.baselines.assign(kBaselineCount,
                                 std::vector<std::vector<Measures>>(
                                     2, std::vector<Measures>(2, Measures{4.0, 2.0, 3.0, 4})));
    evaluation_.baselines[static_cast<size_t>(Baseline::kQuestMax)][0][0].output_error = 1.0;
  }

  static LayerTotals Totals(double error, uint64_t hits, uint64_t misses) {
    LayerTotals totals;
    totals.measures = {4.0, 8 * error, 6.0, 8};
    totals.hit_clusters = hits;
    totals.missed_clusters = misses;
    totals.gathered_bytes = 4096 * misses;
    totals.window_tokens = 100;
    totals.candidate_tokens = 200;
    totals.steps = 2;
    return totals;
  }

  Report Build() {
    return BuildReport(
        {&options_, &trace_, &ranges_, &evaluation_, &service_, {}, "host", "some CPU"});
  }

  TemporaryDirectory directory_;
  Trace trace_;
  ReplayOptions options_;
  std::vector<StepRange> ranges_;
  Evaluation evaluation_;
  ServiceTotals service_;
};

TEST_F(ReportTest, HasTheContractsKeys) {
  const auto json = nlohmann::ordered_json::parse(ReportJson(Build()));
  const auto keys = [](const nlohmann::ordered_json& object) {
    std::vector<std::string> names;
    for (const auto& [key, value] : object.items()) names.push_back(key);
    return names;
  };
  EXPECT_THAT(keys(json),
              ElementsAre("trace", "backend", "mode", "device", "seed", "preset", "results"));
  EXPECT_THAT(keys(json["preset"]),
              ElementsAre("name", "sink_tokens", "min_window", "decode_segment_tokens",
                          "prompt_segment_tokens", "tokens_per_cluster", "kmeans_iterations",
                          "group", "center_keys", "estimate", "cache_tokens", "quest_group"));
  ASSERT_EQ(json["results"].size(), 2u * 2 * 3);
  for (const auto& row : json["results"]) {
    EXPECT_THAT(keys(row), ElementsAre("method", "budget", "layer", "recall", "output_error",
                                       "mass", "hit_rate", "host_bytes_per_step",
                                       "window_tokens_mean", "candidate_tokens_mean"));
  }
  EXPECT_EQ(json["trace"], "some/trace.safetensors");
  EXPECT_EQ(json["mode"], "direct");
  EXPECT_EQ(json["seed"], 18446744073709551615u);
  EXPECT_EQ(json["preset"]["quest_group"], "max");
}

TEST_F(ReportTest, AveragesLayersAndSumsBytes) {
  const auto results = nlohmann::json::parse(ReportJson(Build()))["results"];
  EXPECT_EQ(results[0]["budget"], 64);  // as given, not rising
  EXPECT_EQ(results[0]["layer"], 3);
  EXPECT_EQ(results[1]["layer"], 7);
  const auto& all = results[5];
  EXPECT_EQ(all["method"], "clusterkv");
  EXPECT_EQ(all["budget"], 32);
  EXPECT_EQ(all["layer"], "all");
  EXPECT_EQ(all["recall"], 0.5);
  EXPECT_EQ(all["output_error"], 0.5);
  EXPECT_EQ(all["mass"], 0.75);
  EXPECT_EQ(all["hit_rate"], 0.625);
  EXPECT_EQ(all["host_bytes_per_step"], 4096.0);
  EXPECT_EQ(all["window_tokens_mean"], 50.0);
  EXPECT_EQ(all["candidate_tokens_mean"], 100.0);
}

TEST_F(ReportTest, GivesTheBaselinesTheScheduleAndNulls) {
  const auto results = nlohmann::json::parse(ReportJson(Build()))["results"];
  const auto& quest = results[11];
  EXPECT_EQ(quest["method"], "quest");
  EXPECT_EQ(quest["layer"], "all");
  EXPECT_EQ(quest["output_error"], (0.25 + 0.5) / 2);  // of rule max, which is the best
  EXPECT_TRUE(quest["hit_rate"].is_null());
  EXPECT_TRUE(quest["host_bytes_per_step"].is_null());
  EXPECT_EQ(quest["window_tokens_mean"], (51.0 + 42.0) / 2);
  EXPECT_EQ(quest["candidate_tokens_mean"], (96.0 + 106.0) / 2);
}

TEST_F(ReportTest, HasNoQuestGroupWithoutQuest) {
  options_.methods = {Method::kWindow};
  EXPECT_TRUE(nlohmann::json::parse(ReportJson(Build()))["preset"]["quest_group"].is_null());
}

TEST_F(ReportTest, ASweepOfTheCacheAddsItsHits) {
  EXPECT_FALSE(nlohmann::json::parse(ReportJson(Build())).contains("cache_sweep"));
  options_.cache_sweep = {4096};
  ServiceTotals swept = service_;
  swept.budgets[0] = {Totals(0.25, 3, 1), Totals(0.75, 1, 0)};
  swept.budgets[1].assign(2, LayerTotals());  // too small for budget 64
  const auto report = BuildReport(
      {&options_, &trace_, &ranges_, &evaluation_, &service_, {swept}, "host", "some CPU"});
  const auto rows = nlohmann::json::parse(ReportJson(report))["cache_sweep"];
  ASSERT_EQ(rows.size(), 2u * 3 + 3);
  // The run's own size, 0, as it is resolved.
  EXPECT_EQ(rows[0]["cache_tokens"], 4 * 32 + options_.method.largest_cluster_tokens());
  EXPECT_EQ(rows[2]["layer"], "all");
  EXPECT_EQ(rows[2]["hit_rate"], 0.625);
  EXPECT_EQ(rows[5]["budget"], 64);
  EXPECT_EQ(rows[8], nlohmann::json({{"cache_tokens", 4096},
                                     {"budget", 32},
                                     {"layer", "all"},
                                     {"hit_rate", 0.875},
                                     {"host_bytes_per_step", 2048.0}}));
  EXPECT_THAT(ReportTable(report),
              HasSubstr("     32          4096     87.5%     75.0%          2.0"));
}

TEST_F(ReportTest, JsonIsOneLineEvenOfOddPaths) {
  options_.trace = "\xff\n";
  const std::string text = ReportJson(Build());
  EXPECT_EQ(text.find('\n'), text.size() - 1);
  EXPECT_TRUE(nlohmann::json::accept(text));
}

TEST_F(ReportTest, TableMarksTheLowestErrorOfABudget) {
  const std::string text = ReportTable(Build());
  EXPECT_THAT(text, HasSubstr("     64  clusterkv          0.500       0.5000*"));
  EXPECT_THAT(text, HasSubstr("     32  quest (max)        1.000       0.3750*"));
  EXPECT_THAT(text, HasSubstr("     62.5%     50.0%          4.0"));
  EXPECT_THAT(text, HasSubstr("preset default"));
  for (const char c : text) EXPECT_LT(static_cast<unsigned char>(c), 128);
}

}  // namespace
}  // namespace clusterkv::client::replay
