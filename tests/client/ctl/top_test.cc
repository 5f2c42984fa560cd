#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "client/ctl/top/rates.h"
#include "client/ctl/top/top_view.h"

namespace clusterkv::client::ctl {
namespace {

using testing::HasSubstr;
using testing::Not;

v1::GetStatusReply Status(double uptime, uint64_t scale) {
  v1::GetStatusReply status;
  status.set_boot_epoch(7);
  status.set_ready(true);
  status.set_uptime_seconds(uptime);
  v1::Counters& counters = *status.mutable_counters();
  counters.mutable_direct()->set_hit_clusters(90 * scale);
  counters.mutable_direct()->set_missed_clusters(10 * scale);
  counters.mutable_direct()->set_gathered_bytes(1024 * scale);
  counters.mutable_served()->set_gathered_bytes(1024 * scale);
  counters.set_ingested_tokens(500 * scale);
  counters.set_clustered_tokens(400 * scale);
  counters.set_cluster_problems(8 * scale);
  counters.set_cluster_seconds(0.25 * static_cast<double>(scale));
  return status;
}

v1::SessionInfo& AddSession(v1::GetStatusReply& status, uint64_t id, uint64_t host,
                            uint64_t device) {
  v1::SessionInfo& session = *status.add_session_list();
  session.set_session_id(id);
  session.set_client_name("worker " + std::to_string(id));
  session.set_host_bytes(host);
  session.set_gpu_bytes(device);
  session.set_attached(true);
  return session;
}

std::string Text(const TopTick& tick, bool colour = false) {
  std::string text;
  for (const StyledLine& line : TopLines(tick)) text += line.Render(1000, colour) + "\n";
  return text;
}

TEST(Rates, AreDifferencesByTheDaemonsClock) {
  const auto rates = RatesBetween(Status(10, 1), Status(14, 3));
  ASSERT_TRUE(rates.has_value());
  EXPECT_EQ(rates->seconds, 4);
  EXPECT_EQ(rates->direct.clusters_per_second, 50);
  EXPECT_EQ(rates->direct.hit_rate, 0.9);
  EXPECT_EQ(rates->served.clusters_per_second, 0);
  EXPECT_EQ(rates->served.hit_rate, std::nullopt);
  EXPECT_EQ(rates->gathered_bytes_per_second, 1024);
  EXPECT_EQ(rates->ingested_tokens_per_second, 250);
  EXPECT_EQ(rates->clustered_tokens_per_second, 200);
  EXPECT_EQ(rates->cluster_problems_per_second, 4);
  EXPECT_EQ(rates->cluster_share, 0.125);
}

TEST(Rates, NeedTimeAndOneDaemon) {
  EXPECT_EQ(RatesBetween(Status(10, 1), Status(10, 3)), std::nullopt);
  v1::GetStatusReply restarted = Status(12, 0);
  restarted.set_boot_epoch(8);
  EXPECT_EQ(RatesBetween(Status(10, 1), restarted), std::nullopt);
}

TEST(Top, ShowsRatesOnceThereAreAny) {
  TopTick tick;
  tick.status = Status(14, 3);
  EXPECT_THAT(Text(tick), HasSubstr("direct           -   since the start 90.0 %"));
  EXPECT_THAT(Text(tick), HasSubstr("1.5 k tokens ingested"));
  tick.rates = RatesBetween(Status(10, 1), tick.status);
  EXPECT_THAT(Text(tick), HasSubstr("direct      90.0 % hit of       50 clusters/s"));
  EXPECT_THAT(Text(tick), HasSubstr("250 tokens/s ingested, 200 tokens/s clustered (12.5 % of the "
                                    "time), 1.0 KiB/s read from host"));
}

TEST(Top, DrawsThePoolToScale) {
  TopTick tick;
  v1::HostBytes& host = *tick.status.mutable_host_bytes();
  host.set_total(400);
  host.set_used(100);
  host.set_reserved(200);
  host.set_quarantined(50);
  EXPECT_THAT(Text(tick), HasSubstr("[" + std::string(10, '#') + std::string(20, '=') +
                                    std::string(5, '~') + std::string(5, '.') + "]"));
  tick.status.clear_host_bytes();  // nothing known yet is no crash
  EXPECT_THAT(Text(tick), HasSubstr("[" + std::string(40, '.') + "]"));
}

TEST(Top, SortsSessionsByMemoryAndKeepsNamesHarmless) {
  TopTick tick;
  AddSession(tick.status, 1, 10, 0);
  AddSession(tick.status, 2, 5, 100).set_client_name("evil\x1b[2J\n");
  AddSession(tick.status, 3, 50, 0).set_attached(false);
  const std::string text = Text(tick);
  EXPECT_LT(text.find("evil?[2J?"), text.find("worker 3 (not attached)"));
  EXPECT_LT(text.find("worker 3"), text.find("worker 1"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
  EXPECT_THAT(Text(tick, /*colour=*/true), HasSubstr("\x1b[1mSESSION"));
}

v1::HostBytes& AddGrant(v1::GetStatusReply& status, const std::string& id, uint64_t limit) {
  v1::GrantInfo& grant = *status.add_grant_list();
  grant.set_grant(id);
  grant.mutable_host_bytes()->set_total(limit);
  return *grant.mutable_host_bytes();
}

TEST(Top, ShowsGrantsWhereThereAreAny) {
  TopTick tick;
  AddSession(tick.status, 1, 10, 0).set_grant("00000000000000aa");
  AddSession(tick.status, 2, 20, 0).set_grant("00000000000000aa");
  AddSession(tick.status, 3, 30, 0);
  EXPECT_THAT(Text(tick), Not(HasSubstr("GRANT")));
  v1::HostBytes& used = AddGrant(tick.status, "00000000000000aa", 4096);
  used.set_used(1024);
  used.set_reserved(2048);
  used.set_quarantined(512);
  AddGrant(tick.status, "evil\x1b[2J", 8192);
  const std::string text = Text(tick);
  EXPECT_THAT(text,
              testing::ContainsRegex("GRANT +LIMIT +USED +RESERVED +QUARANTINED +SESSIONS\n"));
  EXPECT_THAT(text,
              testing::ContainsRegex("00000000000000aa +4.0 KiB +1.0 KiB +2.0 KiB +512 B +2\n"));
  EXPECT_THAT(text, testing::ContainsRegex("evil.?.2J +8.0 KiB +0 B +0 B +0 B +0\n"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
  EXPECT_LT(text.find("GRANT"), text.find("SESSION "));
  EXPECT_THAT(Text(tick, /*colour=*/true), HasSubstr("\x1b[1mGRANT"));
  const auto json = nlohmann::json::parse(TopJson(tick))["grant_list"];
  EXPECT_EQ(json[0]["grant"], "00000000000000aa");
  EXPECT_EQ(json[0]["host_bytes"]["quarantined"], 512);
  EXPECT_EQ(json.size(), 2u);
}

TEST(Top, ShowsTheLastErrorsAndAnAnswerThatDidNotCome) {
  TopTick tick;
  for (int i = 0; i < 5; ++i) {
    v1::RecentError& error = *tick.status.add_recent_errors();
    error.set_level("error");
    error.set_text("error " + std::to_string(i));
  }
  EXPECT_THAT(Text(tick), testing::AllOf(HasSubstr("error 4"), HasSubstr("error 2"),
                                         Not(HasSubstr("error 1"))));
  tick.error = "GetStatus at unix:x: gone";
  EXPECT_THAT(Text(tick), testing::AllOf(HasSubstr("no answer"), HasSubstr(tick.error)));
}

TEST(Top, JsonIsOneLineATick) {
  TopTick tick;
  tick.time = "2026-11-24T23:44:30Z";
  tick.status = Status(14, 3);
  AddSession(tick.status, 1, 10, 0).set_client_name("a\nb");
  AddSession(tick.status, 2, 20, 0);
  const std::string first = TopJson(tick);
  EXPECT_THAT(first, Not(HasSubstr("\n")));
  EXPECT_TRUE(nlohmann::json::parse(first)["rates"].is_null());
  tick.rates = RatesBetween(Status(10, 1), tick.status);
  const auto json = nlohmann::json::parse(TopJson(tick));
  EXPECT_EQ(json["rates"]["direct"]["hit_rate"], 0.9);
  EXPECT_TRUE(json["rates"]["served"]["hit_rate"].is_null());
  EXPECT_EQ(json["rates"]["ingested_tokens_per_second"], 250);
  EXPECT_EQ(json["counters"]["ingested_tokens"], 1500);
  EXPECT_EQ(json["session_list"][0]["session_id"], 2);
  EXPECT_EQ(json["ready"], true);
  tick.error = "gone";
  EXPECT_EQ(nlohmann::json::parse(TopJson(tick)),
            nlohmann::json({{"time", tick.time}, {"address", ""}, {"error", "gone"}}));
}

}  // namespace
}  // namespace clusterkv::client::ctl
