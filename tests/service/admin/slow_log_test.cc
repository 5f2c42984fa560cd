#include "service/slow_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

namespace clusterkv::service {
namespace {

using nlohmann::json;

class SlowLogTest : public testing::Test {
 protected:
  SlowLogTest() { InitLogging(LogFormat::kJson, LogLevel::kInfo); }
  ~SlowLogTest() override { InitLogging(LogFormat::kText, LogLevel::kInfo); }

  static std::vector<json> Reported(SlowLog& log, const OperationTrace& trace, int times = 1) {
    testing::internal::CaptureStderr();
    for (int i = 0; i < times; ++i) log.Report(SlowLog::kIngestTokens, trace, {{"session", 3}});
    std::istringstream stream(testing::internal::GetCapturedStderr());
    std::vector<json> lines;
    for (std::string line; std::getline(stream, line);) lines.push_back(json::parse(line));
    return lines;
  }

  static OperationTrace Slept() {
    OperationTrace trace("id-1");
    trace.End("first_ms");
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    trace.End("second_ms");
    return trace;
  }
};

TEST_F(SlowLogTest, TellsEachPhaseAndTheWhole) {
  SlowLog log(absl::Milliseconds(5));
  const auto lines = Reported(log, Slept());
  ASSERT_EQ(lines.size(), 1u);
  const json& line = lines[0];
  EXPECT_EQ(line["msg"], "slow operation");
  EXPECT_EQ(line["level"], "warning");
  EXPECT_EQ(line["operation"], "IngestTokens");
  EXPECT_EQ(line["session"], 3);
  EXPECT_EQ(line["request_id"], "id-1");
  EXPECT_GE(line["second_ms"], 5.0);
  EXPECT_LT(line["first_ms"], line["second_ms"]);
  EXPECT_NEAR(line["total_ms"], line["first_ms"].get<double>() + line["second_ms"].get<double>(),
              0.01);
}

TEST_F(SlowLogTest, IsSilentBelowTheThresholdAndWhenSwitchedOff) {
  SlowLog patient(absl::Hours(1));
  EXPECT_TRUE(Reported(patient, Slept()).empty());
  SlowLog off(absl::ZeroDuration());
  EXPECT_TRUE(Reported(off, Slept()).empty());
}

TEST_F(SlowLogTest, IsBoundedForEachOperation) {
  SlowLog log(absl::Nanoseconds(1));
  EXPECT_EQ(Reported(log, Slept(), 50).size(), 5u);
  testing::internal::CaptureStderr();
  log.Report(SlowLog::kClustering, Slept(), {});
  EXPECT_THAT(testing::internal::GetCapturedStderr(), testing::HasSubstr("clustering"));
}

TEST_F(SlowLogTest, ATraceWithoutACallNamesNone) {
  SlowLog log(absl::Nanoseconds(1));
  OperationTrace trace;
  trace.End("only_ms");
  EXPECT_FALSE(Reported(log, trace)[0].contains("request_id"));
}

TEST_F(SlowLogTest, MorePhasesThanFitStillCount) {
  SlowLog log(absl::Nanoseconds(1));
  OperationTrace trace;
  for (size_t i = 0; i < OperationTrace::kMaxPhases; ++i) trace.End("same_ms");
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  trace.End("late_ms");
  const auto lines = Reported(log, trace);
  EXPECT_FALSE(lines[0].contains("late_ms"));
  EXPECT_GE(lines[0]["total_ms"], 2.0);
}

}  // namespace
}  // namespace clusterkv::service
