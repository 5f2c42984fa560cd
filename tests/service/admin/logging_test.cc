#include "service/logging.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>
#include <vector>

#include "service/recent_errors.h"

namespace clusterkv::service {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::Not;

constexpr char kTime[] = "2026-11-24T23:44:30.123Z";

std::string Text(const std::string& message, LogFields fields = {}) {
  return FormatLogLine(LogFormat::kText, kTime, LogLevel::kInfo, message, fields);
}
std::string Json(const std::string& message, LogFields fields = {}) {
  return FormatLogLine(LogFormat::kJson, kTime, LogLevel::kWarning, message, fields);
}

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

class Logging : public testing::Test {
 protected:
  ~Logging() override { InitLogging(LogFormat::kText, LogLevel::kInfo); }
};

TEST_F(Logging, TextIsOneLineWithFieldsByName) {
  EXPECT_EQ(Text("sequence registered", {{"session", uint64_t{3}}, {"sequence", 17}}),
            "2026-11-24T23:44:30.123Z info sequence registered session=3 sequence=17");
}

TEST_F(Logging, TextQuotesWhatIsNotOneWord) {
  EXPECT_EQ(Text("m", {{"a", "two words"}, {"b", "x=y"}, {"c", ""}, {"d", "say \"hi\""}}),
            std::string(kTime) + " info m a=\"two words\" b=\"x=y\" c=\"\" d=\"say \\\"hi\\\"\"");
}

TEST_F(Logging, NothingThatAClientSendsStartsANewLine) {
  const std::string name = "x\n2026-11-24T23:44:30.123Z error forged\r\x1b[31m\x7f\xff";
  for (const std::string& line :
       {Text("client " + name, {{"name", name}}), Json("client " + name, {{"name", name}})}) {
    for (const char c : line) EXPECT_GE(static_cast<unsigned char>(c), 0x20) << line;
  }
}

TEST_F(Logging, JsonKeepsTypesAndEscapes) {
  const json line = json::parse(Json("tab\t\"quoted\"", {{"session", uint64_t{1} << 63},
                                                         {"delta", -4},
                                                         {"ratio", 0.5},
                                                         {"attached", true},
                                                         {"path", "C:\\x\n"}}));
  EXPECT_EQ(line["ts"], kTime);
  EXPECT_EQ(line["level"], "warning");
  EXPECT_EQ(line["msg"], "tab\t\"quoted\"");
  EXPECT_EQ(line["session"].get<uint64_t>(), uint64_t{1} << 63);
  EXPECT_EQ(line["delta"], -4);
  EXPECT_EQ(line["ratio"], 0.5);
  EXPECT_EQ(line["attached"], true);
  EXPECT_EQ(line["path"], "C:\\x\n");
}

TEST_F(Logging, IsAsciiSoThatNoReaderSeesALineBreak) {
  const std::string name =
      "a\xe2\x80\xa8"
      "b\xc2\x85";  // U+2028, U+0085
  EXPECT_THAT(Json("m", {{"client", name}}), HasSubstr("\"client\":\"a\\u2028b\\u0085\""));
  EXPECT_THAT(Text("m", {{"client", name}}), HasSubstr("client=\"a\\u2028b\\u0085\""));
  EXPECT_EQ(json::parse(Json("m", {{"client", name}}))["client"], name);
}

TEST_F(Logging, JsonSurvivesBytesThatAreNoUtf8AndNumbersThatAreNone) {
  const json line = json::parse(
      Json("bad \xc3\x28", {{"x", std::numeric_limits<double>::quiet_NaN()}, {"y", "\xff"}}));
  EXPECT_TRUE(line["x"].is_null());
  EXPECT_TRUE(line["y"].is_string());
}

TEST_F(Logging, WritesToStderrFromTheChosenLevelOn) {
  InitLogging(LogFormat::kText, LogLevel::kWarning);
  testing::internal::CaptureStderr();
  LogDebug("one");
  LogInfo("two");
  LogWarning("three", {{"session", 9}});
  LogError("four");
  const auto lines = Lines(testing::internal::GetCapturedStderr());
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_THAT(lines[0], HasSubstr("Z warning three session=9"));
  EXPECT_THAT(lines[1], HasSubstr("Z error four"));
}

TEST_F(Logging, KeepsWarningsAndErrorsForThoseWhoLookAtTheDaemon) {
  InitLogging(LogFormat::kJson, LogLevel::kError);  // the log has no warnings
  testing::internal::CaptureStderr();
  LogInfo("not kept");
  LogWarning("kept", {{"session", 9}, {"client", "evil\n\"name\""}});
  LogError("kept too");
  EXPECT_EQ(Lines(testing::internal::GetCapturedStderr()).size(), 1u);
  const auto kept = DaemonErrors().List();
  ASSERT_GE(kept.size(), 2u);
  const RecentError& warning = kept[kept.size() - 2];
  EXPECT_EQ(warning.level, "warning");
  EXPECT_EQ(warning.text, "kept session=9 client=\"evil\\n\\\"name\\\"\"");
  EXPECT_THAT(warning.time, testing::MatchesRegex("....-..-..T..:..:......Z"));
  EXPECT_EQ(kept.back().level, "error");
  EXPECT_EQ(kept.back().text, "kept too");
  for (const RecentError& error : kept) EXPECT_NE(error.text, "not kept");
}

TEST_F(Logging, BracesInAMessageAreNoFormat) {
  testing::internal::CaptureStderr();
  LogInfo("{} {0} {x}");
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("info {} {0} {x}\n"));
}

TEST_F(Logging, ThreadsNeverMixTheirLines) {
  constexpr int kThreads = 4;
  constexpr int kEach = 200;
  InitLogging(LogFormat::kJson, LogLevel::kInfo);
  testing::internal::CaptureStderr();
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < kEach; ++i) LogInfo("line", {{"session", t}, {"sequence", i}});
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto lines = Lines(testing::internal::GetCapturedStderr());
  ASSERT_EQ(lines.size(), size_t{kThreads} * kEach);
  std::vector<int> next(kThreads, 0);
  for (const std::string& text : lines) {
    const json line = json::parse(text);
    EXPECT_EQ(line["sequence"], next[line["session"].get<size_t>()]++);
  }
}

}  // namespace
}  // namespace clusterkv::service
