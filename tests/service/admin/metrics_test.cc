#include "service/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ctime>
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
  status.gpu = "host";
  status.ready = true;
  status.uptime_seconds = 12.5;
  status.sequences = 4;
  status.device_age_seconds = 0.5;
  status.tick_age_seconds = 0.25;
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
                   .gathered_bytes = 1500,
                   .layers = {}};
  status.served = {.hit_clusters = 7,
                   .missed_clusters = 2,
                   .hit_tokens = 70,
                   .missed_tokens = 21,
                   .hit_bytes = 3500,
                   .missed_bytes = 1000,
                   .gathered_bytes = 900,
                   .layers = {}};
  status.grants = {{.grant = 0xa, .host = {.total_bytes = 30}},
                   {.grant = 0xb, .host = {.total_bytes = 20}}};
  status.device_plugin_registered = true;
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
  EXPECT_EQ(samples.at("clusterkv_grants"), 2);
  EXPECT_EQ(samples.at("clusterkv_grant_bytes"), 50);
  EXPECT_EQ(samples.at("clusterkv_device_plugin_registered"), 1);
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
    EXPECT_TRUE(type == "counter" || type == "gauge" || name.ends_with("_seconds") ||
                name.ends_with("_ratio"))
        << name;
  }
  EXPECT_EQ(help, seen.size());
}

TEST(Metrics, TellsWhatTheProcessUses) {
  const auto samples = Samples(MetricsText(SomeStatus()));
  EXPECT_GT(samples.at("process_resident_memory_bytes"), 1 << 20);
  EXPECT_GT(samples.at("process_open_fds"), 2);
  EXPECT_GE(samples.at("process_cpu_seconds_total"), 0);
  EXPECT_GT(samples.at("process_virtual_memory_bytes"),
            samples.at("process_resident_memory_bytes"));
  EXPECT_GT(samples.at("process_max_fds"), samples.at("process_open_fds"));
  EXPECT_GE(samples.at("process_threads"), 1);
  const double start = samples.at("process_start_time_seconds");
  EXPECT_NEAR(start, static_cast<double>(std::time(nullptr)), 3600);
  EXPECT_EQ(Samples(MetricsText(SomeStatus())).at("process_start_time_seconds"), start);
}

TEST(Metrics, TimesAreCumulativeBuckets) {
  DaemonStatus status = SomeStatus();
  status.fetch.call.Observe(0.0001);  // a bound belongs to its bucket
  status.fetch.call.Observe(0.0002);
  status.fetch.call.Observe(61);
  status.fetch.call.Observe(-1);  // the clock was set back
  status.fetch.phases[static_cast<size_t>(FetchPhase::kGather)].Observe(0.25);
  const auto samples = Samples(MetricsText(status));
  EXPECT_EQ(samples.at("clusterkv_fetch_seconds_bucket{le=\"0.0001\"}"), 2);
  EXPECT_EQ(samples.at("clusterkv_fetch_seconds_bucket{le=\"0.00025\"}"), 3);
  EXPECT_EQ(samples.at("clusterkv_fetch_seconds_bucket{le=\"60\"}"), 3);
  EXPECT_EQ(samples.at("clusterkv_fetch_seconds_bucket{le=\"+Inf\"}"), 4);
  EXPECT_EQ(samples.at("clusterkv_fetch_seconds_count"), 4);
  EXPECT_NEAR(samples.at("clusterkv_fetch_seconds_sum"), 61.0003, 1e-9);
  EXPECT_EQ(samples.at("clusterkv_fetch_phase_seconds_count{phase=\"gather\"}"), 1);
  EXPECT_EQ(samples.at("clusterkv_fetch_phase_seconds_sum{phase=\"gather\"}"), 0.25);
  EXPECT_EQ(samples.at("clusterkv_fetch_phase_seconds_count{phase=\"queue\"}"), 0);
}

TEST(Metrics, HasEachLayerThatSequencesHad) {
  DaemonStatus status = SomeStatus();
  status.direct.layers = {{.hit_clusters = 6, .missed_clusters = 1},
                          {.hit_clusters = 4, .missed_clusters = 2}};
  const auto samples = Samples(MetricsText(status));
  const std::string hit = "clusterkv_cache_layer_clusters_hit_total{gpu=\"host\",layer=\"";
  EXPECT_EQ(samples.at(hit + "0\",mode=\"direct\"}"), 6);
  EXPECT_EQ(samples.at(hit + "1\",mode=\"direct\"}"), 4);
  EXPECT_FALSE(samples.contains(hit + "2\",mode=\"direct\"}"));
  EXPECT_FALSE(samples.contains(hit + "0\",mode=\"served\"}"));
}

TEST(Metrics, HasTheMethodsOfTheServiceAndEveryCode) {
  DaemonStatus status = SomeStatus();
  RpcStatus& rpc = status.rpcs.emplace_back();
  rpc.service = "s";
  rpc.method = "M";
  rpc.type = "unary";
  rpc.started = 3;
  rpc.handled[0] = 1;
  rpc.handled[16] = 1;
  rpc.seconds.Observe(0.5);
  const auto samples = Samples(MetricsText(status));
  const std::string labels = "grpc_method=\"M\",grpc_service=\"s\",grpc_type=\"unary\"}";
  EXPECT_EQ(samples.at("grpc_server_started_total{" + labels), 3);
  EXPECT_EQ(samples.at("grpc_server_handled_total{grpc_code=\"OK\"," + labels), 1);
  EXPECT_EQ(samples.at("grpc_server_handled_total{grpc_code=\"Unauthenticated\"," + labels), 1);
  EXPECT_EQ(samples.at("grpc_server_handled_total{grpc_code=\"Internal\"," + labels), 0);
  EXPECT_EQ(samples.at("grpc_server_handling_seconds_sum{" + labels), 0.5);
}

TEST(Metrics, WorksBeforeAnythingHasHappened) {
  DaemonStatus status;
  status.backend = status.gpu = "host";
  const auto samples = Samples(MetricsText(status));
  EXPECT_EQ(samples.at("clusterkv_ready"), 0);
  EXPECT_EQ(samples.at("clusterkv_cache_clusters_selected_total{gpu=\"host\",mode=\"direct\"}"), 0);
}

}  // namespace
}  // namespace clusterkv::service
