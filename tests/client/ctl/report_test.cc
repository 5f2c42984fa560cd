#include "client/ctl/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace clusterkv::client::ctl {
namespace {

using testing::HasSubstr;
using testing::Not;

v1::GetStatusReply Status() {
  v1::GetStatusReply status;
  status.set_version("1.2.3");
  v1::SessionInfo& session = *status.add_session_list();
  session.set_session_id(3);
  session.set_client_name("evil\x1b]0;title\x07\nFORGED");
  v1::RecentError& error = *status.add_recent_errors();
  error.set_time("2026-11-24T23:44:30.123Z");
  error.set_level("warning");
  error.set_text("session over");
  error.set_count(3);
  return status;
}

TEST(CtlReport, ANameCannotReachTheTerminal) {
  const std::string table = SessionsTable(Status());
  EXPECT_THAT(table, HasSubstr("evil?]0;title??FORGED"));
  EXPECT_THAT(table, Not(HasSubstr("\x1b")));
  v1::ListSequencesReply list;
  list.add_sequences()->set_failure("bad\x1b[2J");
  EXPECT_THAT(SequencesTable(list), HasSubstr("bad?[2J"));
}

TEST(CtlReport, StatusCountsRecentErrors) {
  EXPECT_THAT(StatusTable(Status()), HasSubstr("3, the last: session over"));
  EXPECT_THAT(StatusTable({}), HasSubstr("none since the start"));
  const auto json = nlohmann::json::parse(StatusJson(Status()));
  EXPECT_EQ(json["recent_errors"][0], nlohmann::json({{"time", "2026-11-24T23:44:30.123Z"},
                                                      {"level", "warning"},
                                                      {"text", "session over"},
                                                      {"count", 3}}));
  EXPECT_EQ(json["session_list"][0]["client_name"], "evil\x1b]0;title\x07\nFORGED");
}

}  // namespace
}  // namespace clusterkv::client::ctl
