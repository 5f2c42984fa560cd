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
  const json got = json::parse(StatusJson(status));
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
  const json got = json::parse(StatusJson(status))["session_list"];
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

TEST(StatusJson, WithoutSessionsIsAnEmptyList) {
  const json got = json::parse(StatusJson(DaemonStatus{}));
  EXPECT_TRUE(got["session_list"].is_array());
  EXPECT_TRUE(got["session_list"].empty());
}

}  // namespace
}  // namespace clusterkv::service
