#include "client/replay/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "client/replay/preset_keys.h"
#include "tests/client/replay/random_trace.h"

namespace clusterkv::client::replay {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::optional<ReplayOptions>> Parse(std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "clusterkv-replay");
  return ParseOptions(static_cast<int>(arguments.size()), arguments.data());
}

TEST(ReplayOptions, HaveTheContractsDefaults) {
  const auto parsed = Parse({"a.safetensors"});
  ASSERT_TRUE(parsed.ok() && parsed->has_value()) << parsed.status();
  const ReplayOptions& options = **parsed;
  EXPECT_EQ(options.trace, "a.safetensors");
  EXPECT_THAT(options.methods,
              ElementsAre(Method::kClusterkv, Method::kQuest, Method::kWindow, Method::kOracle));
  EXPECT_THAT(options.budgets, ElementsAre(128, 256, 512, 1024));
  EXPECT_EQ(options.preset, "default");
  EXPECT_EQ(options.mode, FetchMode::kDirect);
  EXPECT_EQ(options.publish, Publish::kSync);
  EXPECT_EQ(options.format, Format::kTable);
  EXPECT_EQ(options.sequences, 1u);
  EXPECT_EQ(options.workers, 1u);
  EXPECT_FALSE(options.worker_index.has_value());
}

TEST(ReplayOptions, TakeTheDaemonFromTheEnvironmentUnlessToldOtherwise) {
  ASSERT_EQ(setenv("CLUSTERKV_ADDRESS", "unix:/grant.sock", 1), 0);
  const auto granted = Parse({"t"});
  const auto told = Parse({"t", "--connect", "unix:/other.sock"});
  ASSERT_EQ(unsetenv("CLUSTERKV_ADDRESS"), 0);
  ASSERT_TRUE(granted.ok() && told.ok());
  EXPECT_EQ((*granted)->connect, "unix:/grant.sock");
  EXPECT_EQ((*told)->connect, "unix:/other.sock");
  EXPECT_EQ((*Parse({"t"}))->connect, "");
}

TEST(ReplayOptions, RepeatOnlyAsTables) {
  EXPECT_EQ((*Parse({"t"}))->repeat, 1u);
  EXPECT_EQ((*Parse({"t", "--repeat", "0"}))->repeat, 0u);
  EXPECT_TRUE(Parse({"t", "--repeat=1", "--format=json"}).ok());
  const auto several = Parse({"t", "--repeat=2", "--format=json"});
  EXPECT_EQ(several.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(several.status().message()), HasSubstr("--repeat"));
  EXPECT_FALSE(Parse({"t", "--repeat", "-1"}).ok());
}

TEST(ReplayOptions, AreRead) {
  const auto parsed = Parse({"--methods",
                             "quest,clusterkv,quest",
                             "--budgets=64,32,64",
                             "--preset",
                             "paper",
                             "--set",
                             "min_window=7",
                             "--set",
                             "group=max",
                             "t",
                             "--set=estimate=true",
                             "--cache-tokens",
                             "9000",
                             "--mode",
                             "served",
                             "--backend",
                             "host",
                             "--connect",
                             "unix:/s",
                             "--sequences",
                             "3",
                             "--workers",
                             "2",
                             "--steps",
                             "5",
                             "--seed",
                             "11",
                             "--dump-outputs",
                             "d",
                             "--format",
                             "json",
                             "--publish",
                             "async"});
  ASSERT_TRUE(parsed.ok() && parsed->has_value()) << parsed.status();
  const ReplayOptions& options = **parsed;
  EXPECT_EQ(options.trace, "t");
  EXPECT_THAT(options.methods, ElementsAre(Method::kQuest, Method::kClusterkv));
  EXPECT_THAT(options.budgets, ElementsAre(64, 32));
  EXPECT_EQ(options.method.tokens_per_cluster, 80u);
  EXPECT_EQ(options.method.min_window_tokens, 7u);
  EXPECT_EQ(options.method.group, gpu::GroupRule::kMax);
  EXPECT_TRUE(options.method.estimate);
  EXPECT_EQ(options.method.cache_tokens, 9000u);
  EXPECT_EQ(options.mode, FetchMode::kServed);
  EXPECT_EQ(options.backend, "host");
  EXPECT_EQ(options.connect, "unix:/s");
  EXPECT_EQ(options.sequences, 3u);
  EXPECT_EQ(options.workers, 2u);
  EXPECT_EQ(options.steps, 5u);
  EXPECT_EQ(options.seed, 11u);
  EXPECT_EQ(options.dump_outputs, "d");
  EXPECT_EQ(options.format, Format::kJson);
  EXPECT_EQ(options.publish, Publish::kAsync);
}

TEST(ReplayOptions, NameTheBadOptionAndWhatIsAllowed) {
  const std::pair<std::vector<const char*>, std::pair<const char*, const char*>> cases[] = {
      {{}, {"TRACE", "required"}},
      {{"t", "--what"}, {"--what", "not expected"}},
      {{"t", "--methods", "quest,best"}, {"--methods", "clusterkv, quest, window, oracle"}},
      {{"t", "--budgets", "0"}, {"--budgets", "1 to 1048576"}},
      {{"t", "--budgets", "64,"}, {"--budgets", "1 to 1048576"}},
      {{"t", "--budgets", "-64"}, {"--budgets", "1 to 1048576"}},
      {{"t", "--preset", "best"}, {"preset", "default, paper"}},
      {{"t", "--set", "min_window"}, {"--set", "KEY=VALUE"}},
      {{"t", "--set", "quest_group=max"}, {"--set", "sink_tokens"}},
      {{"t", "--set", "estimate=maybe"}, {"estimate", "true, false"}},
      {{"t", "--set", "group=sum"}, {"group", "softmax, mean, max"}},
      {{"t", "--set", "sink_tokens=1.5"}, {"sink_tokens", "whole number"}},
      {{"t", "--cache-tokens", "many"}, {"--cache-tokens", "0 to"}},
      {{"t", "--cache-tokens", "8192,"}, {"--cache-tokens", "0 to"}},
      {{"t", "--cache-tokens", "0,8192", "--methods", "quest"}, {"--cache-tokens", "--methods"}},
      {{"t", "--mode", "remote"}, {"--mode", "direct, served"}},
      {{"t", "--backend", "tpu"}, {"--backend", "auto, host, cuda"}},
      {{"t", "--format", "xml"}, {"--format", "table, json"}},
      {{"t", "--publish", "never"}, {"--publish", "sync, async"}},
      {{"t", "--sequences", "0"}, {"--sequences", "1 to"}},
      {{"t", "--workers", "9999"}, {"--workers", "1 to"}},
      {{"t", "--steps", "0"}, {"--steps", "1 to"}},
      {{"t", "--audit-rate", "1.5"}, {"--audit-rate", "0 to 1"}},
      {{"t", "--audit-rate", "nan"}, {"--audit-rate", "0 to 1"}},
      {{"t", "--audit-rate", "often"}, {"--audit-rate", "0 to 1"}},
      {{"t", "--seed", "-1"}, {"--seed", "0 to"}},
      {{"t", "--methods", "quest", "--dump-outputs", "d"}, {"--dump-outputs", "--methods"}},
  };
  for (const auto& [arguments, parts] : cases) {
    const auto parsed = Parse(arguments);
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << parts.first;
    EXPECT_THAT(std::string(parsed.status().message()),
                AllOf(HasSubstr(parts.first), HasSubstr(parts.second)));
  }
}

TEST(ReplayOptions, FurtherSizesOfTheCacheAreTheSweep) {
  const auto parsed = Parse({"t", "--cache-tokens", "0,8192,4096,8192", "--html", "r.html"});
  ASSERT_TRUE(parsed.ok() && parsed->has_value()) << parsed.status();
  EXPECT_EQ((*parsed)->method.cache_tokens, 0u);
  EXPECT_THAT((*parsed)->cache_sweep, ElementsAre(8192, 4096));
  EXPECT_EQ((*parsed)->html, "r.html");
  EXPECT_THAT((*Parse({"t", "--cache-tokens", "4096"}))->cache_sweep, ElementsAre());
}

TEST(ReplayOptions, AWorkerOfTheSweepWritesNoDump) {
  const auto worker = [](const char* cache_tokens) {
    return *Parse({"--worker-index=1", "--result-fd=9", "--worker-address=unix:/s", "t",
                   "--cache-tokens", "4096,8192", "--dump-outputs", "d", "--worker-cache-tokens",
                   cache_tokens});
  };
  EXPECT_EQ(worker("4096")->dump_outputs, "d");
  EXPECT_EQ(worker("8192")->dump_outputs, "");
  EXPECT_EQ(worker("8192")->method.cache_tokens, 8192u);
}

TEST(ReplayOptions, HelpIsNoError) {
  testing::internal::CaptureStdout();
  const auto parsed = Parse({"--help"});
  EXPECT_THAT(testing::internal::GetCapturedStdout(), HasSubstr("--budgets"));
  ASSERT_TRUE(parsed.ok());
  EXPECT_FALSE(parsed->has_value());
}

TEST(ReplayOptions, AreCheckedAgainstTheTrace) {
  const TemporaryDirectory directory;
  const Trace trace = MakeRandomTrace(directory, {.steps = 12});
  auto all = Parse({"t"});
  ASSERT_TRUE(all.ok());
  ASSERT_TRUE(CheckAgainstTrace(trace, **all).ok());
  EXPECT_EQ((*all)->steps, 12u);
  const gpu::MethodOptions method = MethodForBudget(**all, trace, 256);
  EXPECT_EQ(method.budget_tokens, 256u);
  EXPECT_EQ(method.softmax_scale, trace.softmax_scale());

  auto too_many = Parse({"t", "--steps", "13"});
  ASSERT_TRUE(too_many.ok());
  EXPECT_THAT(std::string(CheckAgainstTrace(trace, **too_many).message()),
              HasSubstr("allowed: 1 to 12"));
  auto small_cache = Parse({"t", "--budgets", "64,1024", "--cache-tokens", "500"});
  ASSERT_TRUE(small_cache.ok());
  EXPECT_THAT(std::string(CheckAgainstTrace(trace, **small_cache).message()),
              AllOf(HasSubstr("budget 1024"), HasSubstr("cache_tokens is 500")));
  // Of the sweep it has to be enough for one budget.
  auto swept = Parse({"t", "--budgets", "64,1024", "--cache-tokens", "0,500"});
  EXPECT_TRUE(CheckAgainstTrace(trace, **swept).ok());
  swept = Parse({"t", "--budgets", "64,1024", "--cache-tokens", "0,100"});
  EXPECT_THAT(std::string(CheckAgainstTrace(trace, **swept).message()),
              AllOf(HasSubstr("smallest budget, 64"), HasSubstr("cache_tokens is 100")));
}

TEST(PresetKeys, AreTheContractsAndCanBeSet) {
  gpu::MethodOptions method;
  const nlohmann::ordered_json keys = PresetKeys(method);
  for (const auto& [key, value] : keys.items()) {
    const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    EXPECT_TRUE(SetPresetKey(key + "=" + text, method).ok()) << key;
  }
  EXPECT_EQ(PresetKeys(method).dump(),
            R"({"sink_tokens":16,"min_window":0,"decode_segment_tokens":320,)"
            R"("prompt_segment_tokens":8192,"tokens_per_cluster":80,"kmeans_iterations":10,)"
            R"("group":"softmax","center_keys":false,"estimate":false,"cache_tokens":0})");
}

}  // namespace
}  // namespace clusterkv::client::replay
