#include "service/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <sstream>

namespace clusterkv::service {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::Key;

// Sample with its labels -> value, as a scraper reads it.
std::map<std::string, double> Samples(const std::string& text) {
  std::map<std::string, double> samples;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    if (line.empty() || line.front() == '#') continue;
    const size_t space = line.rfind(' ');
    EXPECT_TRUE(samples.emplace(line.substr(0, space), std::stod(line.substr(space + 1))).second)
        << "twice: " << line;
  }
  return samples;
}

DaemonStatus SomeStatus() {
  DaemonStatus status;
  status.version = "0.1.0";
  status.backend = "host";
  status.ready = true;
  status.uptime_seconds = 12.5;
  status.sequences = 4;
  status.sessions.resize(2);
  status.host = {
      .total_bytes = 100, .used_bytes = 40, .reserved_bytes = 25, .quarantined_bytes = 5};
  status.gpu_used_bytes = 77;
  status.direct = {.hit_clusters = 10,
                   .missed_clusters = 3,
                   .hit_tokens = 100,
                   .missed_tokens = 31,
                   .hit_bytes = 5000,
                   .missed_bytes = 1500,
                   .gathered_bytes = 1500};
  status.served = {.hit_clusters = 7,
                   .missed_clusters = 2,
                   .hit_tokens = 70,
                   .missed_tokens = 21,
                   .hit_bytes = 3500,
                   .missed_bytes = 1000,
                   .gathered_bytes = 900};
  status.ingested_tokens = 8192;
  status.clustered_tokens = 8000;
  status.published_segments = 3;
  return status;
}

TEST(Metrics, HasEveryNameOthersRelyOn) {
  const auto samples = Samples(MetricsText(SomeStatus()));
  for (const char* unit : {"clusters", "tokens", "bytes"}) {
    for (const char* what : {"selected", "hit", "missed"}) {
      for (const char* mode : {"direct", "served"}) {
        EXPECT_THAT(samples, Contains(Key(std::string("clusterkv_cache_") + unit + "_" + what +
                                          "_total{gpu=\"host\",mode=\"" + mode + "\"}")));
      }
    }
  }
  EXPECT_EQ(samples.at("clusterkv_host_gathered_bytes_total"), 2400);
  EXPECT_EQ(samples.at("clusterkv_ingested_tokens_total"), 8192);
  EXPECT_EQ(samples.at("clusterkv_clustered_tokens_total"), 8000);
  EXPECT_EQ(samples.at("clusterkv_published_segments_total"), 3);
  EXPECT_EQ(samples.at("clusterkv_sessions"), 2);
  EXPECT_EQ(samples.at("clusterkv_sequences"), 4);
  EXPECT_EQ(samples.at("clusterkv_gpu_arena_bytes{gpu=\"host\"}"), 77);
  EXPECT_EQ(samples.at("clusterkv_build_info{backend=\"host\",version=\"0.1.0\"}"), 1);
}

TEST(Metrics, SelectedIsHitPlusMissedAtEveryScrape) {
  DaemonStatus status = SomeStatus();
  // Odd, and at the edge of what a double holds exactly.
  status.direct.hit_bytes = (1ull << 52) - 1;
  status.direct.missed_bytes = (1ull << 51) + 3;
  const auto samples = Samples(MetricsText(status));
  for (const char* unit : {"clusters", "tokens", "bytes"}) {
    for (const char* mode : {"direct", "served"}) {
      const auto value = [&](const std::string& what) {
        return samples.at(std::string("clusterkv_cache_") + unit + "_" + what +
                          "_total{gpu=\"host\",mode=\"" + mode + "\"}");
      };
      EXPECT_EQ(value("selected"), value("hit") + value("missed")) << unit << " " << mode;
    }
  }
}

TEST(Metrics, StatesOfTheHostPoolAddUpToIt) {
  const auto samples = Samples(MetricsText(SomeStatus()));
  double sum = 0;
  for (const char* state : {"free", "reserved", "used", "quarantined"}) {
    sum += samples.at(std::string("clusterkv_host_pool_bytes{state=\"") + state + "\"}");
  }
  EXPECT_EQ(sum, 100);
  EXPECT_EQ(samples.at("clusterkv_host_pool_bytes{state=\"free\"}"), 30);
}

TEST(Metrics, TypesAndNamesFollowThePrometheusRules) {
  std::set<std::string> seen;
  std::istringstream stream(MetricsText(SomeStatus()));
  size_t help = 0;
  for (std::string line; std::getline(stream, line);) {
    help += line.starts_with("# HELP ") ? 1u : 0u;
    if (!line.starts_with("# TYPE ")) continue;
    std::istringstream words(line.substr(7));
    std::string name, type;
    words >> name >> type;
    EXPECT_TRUE(seen.insert(name).second) << name << " is described twice";
    EXPECT_EQ(type == "counter", name.ends_with("_total")) << name;
    EXPECT_TRUE(type == "counter" || type == "gauge") << name;
  }
  EXPECT_EQ(help, seen.size());
}

TEST(Metrics, TellsWhatTheProcessUses) {
  const auto samples = Samples(MetricsText(SomeStatus()));
  EXPECT_GT(samples.at("process_resident_memory_bytes"), 1 << 20);
  EXPECT_GT(samples.at("process_open_fds"), 2);
  EXPECT_GE(samples.at("process_cpu_seconds_total"), 0);
}

TEST(Metrics, WorksBeforeAnythingHasHappened) {
  DaemonStatus status;
  status.backend = "host";
  const auto samples = Samples(MetricsText(status));
  EXPECT_EQ(samples.at("clusterkv_ready"), 0);
  EXPECT_EQ(samples.at("clusterkv_cache_clusters_selected_total{gpu=\"host\",mode=\"direct\"}"), 0);
}

}  // namespace
}  // namespace clusterkv::service
