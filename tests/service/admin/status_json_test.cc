#include "service/status_json.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace clusterkv::service {
namespace {

using nlohmann::json;

TEST(StatusJson, HasTheKeysOthersRelyOn) {
  DaemonStatus status;
  status.version = "1.2.3";
  status.backend = "host";
  status.device = "host CPU, 2 threads";
  status.boot_epoch = 0xffff'ffff'ffff'fffful;
  status.ready = true;
  status.sequences = 5;
  status.host = {
      .total_bytes = 100, .used_bytes = 40, .reserved_bytes = 30, .quarantined_bytes = 20};
  status.gpu_used_bytes = 7;
  status.sessions.resize(2);
  const json got = json::parse(StatusJson(status, {}));
  EXPECT_EQ(got["version"], "1.2.3");
  EXPECT_EQ(got["backend"], "host");
  EXPECT_EQ(got["device"], "host CPU, 2 threads");
  EXPECT_EQ(got["boot_epoch"].get<uint64_t>(), 0xffff'ffff'ffff'fffful);
  EXPECT_EQ(got["ready"], true);
  EXPECT_EQ(got["sessions"], 2);
  EXPECT_EQ(got["sequences"], 5);
  EXPECT_EQ(got["host_bytes"],
            json({{"total", 100}, {"used", 40}, {"reserved", 30}, {"quarantined", 20}}));
  EXPECT_EQ(got["gpu_bytes"]["used"], 7);
}

TEST(StatusJson, ListsSessionsWithWhateverNamesTheyGave) {
  DaemonStatus status;
  status.sessions.push_back({.session_id = 3,
                             .client_name = "say \"hi\"\n\xff",
                             .pid = 12,
                             .uid = 1000,
                             .sequences = 2,
                             .host_bytes = 64,
                             .gpu_bytes = 8,
                             .age_seconds = 1.5,
                             .attached = true});
  const json got = json::parse(StatusJson(status, {}))["session_list"];
  ASSERT_EQ(got.size(), 1u);
  EXPECT_EQ(got[0]["session_id"], 3);
  EXPECT_EQ(got[0]["client_name"], "say \"hi\"\n\xef\xbf\xbd");
  EXPECT_EQ(got[0]["pid"], 12);
  EXPECT_EQ(got[0]["uid"], 1000);
  EXPECT_EQ(got[0]["sequences"], 2);
  EXPECT_EQ(got[0]["host_bytes"], 64);
  EXPECT_EQ(got[0]["gpu_bytes"], 8);
  EXPECT_EQ(got[0]["age_seconds"], 1.5);
  EXPECT_EQ(got[0]["attached"], true);
}

TEST(StatusJson, TellsCountersByTheirNames) {
  DaemonStatus status;
  status.device_age_seconds = 0.5;
  status.direct = {.hit_clusters = 1,
                   .missed_clusters = 2,
                   .hit_tokens = 3,
                   .missed_tokens = 4,
                   .hit_bytes = 5,
                   .missed_bytes = 6,
                   .gathered_bytes = 7,
                   .layers = {}};
  status.served.hit_clusters = 8;
  status.ingested_tokens = 9;
  status.clustered_tokens = 10;
  status.published_segments = 11;
  status.clustering.problems = 12;
  status.clustering.seconds = 13.5;
  status.sessions_started = 14;
  status.sessions_ended_lost = 15;
  status.rejected_attaches = 16;
  const json got = json::parse(StatusJson(status, {}));
  EXPECT_EQ(got["device_age_seconds"], 0.5);
  json counters = got["counters"];
  EXPECT_EQ(counters["direct"], json({{"hit_clusters", 1},
                                      {"missed_clusters", 2},
                                      {"hit_tokens", 3},
                                      {"missed_tokens", 4},
                                      {"hit_bytes", 5},
                                      {"missed_bytes", 6},
                                      {"gathered_bytes", 7}}));
  EXPECT_EQ(counters["served"]["hit_clusters"], 8);
  counters.erase("direct");
  counters.erase("served");
  EXPECT_EQ(counters, json({{"ingested_tokens", 9},
                            {"clustered_tokens", 10},
                            {"published_segments", 11},
                            {"cluster_problems", 12},
                            {"cluster_seconds", 13.5},
                            {"sessions_started", 14},
                            {"sessions_lost", 15},
                            {"rejected_attaches", 16}}));
}

TEST(StatusJson, ListsRecentErrors) {
  const json got = json::parse(StatusJson(
      DaemonStatus{},
      {{.time = "2026-11-24T23:44:30.123Z", .level = "error", .text = "a b=\"c\"", .count = 2}}));
  EXPECT_EQ(got["recent_errors"], json::array({{{"time", "2026-11-24T23:44:30.123Z"},
                                                {"level", "error"},
                                                {"text", "a b=\"c\""},
                                                {"count", 2}}}));
}

TEST(SequencesJson, TellsEachSequence) {
  SequenceStatus sequence{.sequence = 3,
                          .session = 2,
                          .shape = {.layers = 4,
                                    .kv_heads = 5,
                                    .q_heads = 10,
                                    .head_dim = 64,
                                    .dtype = gpu::DType::kBf16},
                          .mode = FetchMode::kServed,
                          .max_tokens = 100,
                          .ingested_tokens = 90,
                          .prompt_tokens = 80,
                          .published_segments = 7,
                          .cut = 70,
                          .host_bytes = 1000,
                          .state_bytes = 2000,
                          .failure = "bad \xff"};
  const json got = json::parse(SequencesJson(0xffff'ffff'ffff'fffful, {sequence}));
  EXPECT_EQ(got["boot_epoch"].get<uint64_t>(), 0xffff'ffff'ffff'fffful);
  EXPECT_EQ(got["sequences"], json::array({{{"sequence_id", 3},
                                            {"session_id", 2},
                                            {"mode", "served"},
                                            {"shape",
                                             {{"layers", 4},
                                              {"kv_heads", 5},
                                              {"q_heads", 10},
                                              {"head_dim", 64},
                                              {"dtype", "bf16"}}},
                                            {"max_tokens", 100},
                                            {"ingested_tokens", 90},
                                            {"prompt_tokens", 80},
                                            {"published_segments", 7},
                                            {"cut", 70},
                                            {"host_bytes", 1000},
                                            {"state_bytes", 2000},
                                            {"failure", "bad \xef\xbf\xbd"}}}));
}

TEST(StatusJson, WithoutSessionsIsAnEmptyList) {
  const json got = json::parse(StatusJson(DaemonStatus{}, {}));
  EXPECT_TRUE(got["session_list"].is_array());
  EXPECT_TRUE(got["session_list"].empty());
}

}  // namespace
}  // namespace clusterkv::service
