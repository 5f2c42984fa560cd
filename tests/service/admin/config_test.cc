#include "service/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>

#include "gpu/numa_nodes.h"

namespace clusterkv::service {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::Optional;
using testing::Pair;

using Words = std::vector<std::string>;

absl::StatusOr<Config> Load(const Words& flags, const Words& environment = {}) {
  std::vector<const char*> argv{"clusterkvd"};
  for (const std::string& flag : flags) argv.push_back(flag.c_str());
  std::vector<const char*> variables;
  for (const std::string& variable : environment) variables.push_back(variable.c_str());
  variables.push_back(nullptr);
  return LoadConfig(static_cast<int>(argv.size()), argv.data(), variables.data());
}

std::string Message(const absl::StatusOr<Config>& config) {
  return std::string(config.status().message());
}

class ConfigFile : public testing::Test {
 protected:
  ConfigFile()
      : path_(std::filesystem::path(testing::TempDir()) /
              ("clusterkvd_config_" + std::to_string(getpid()) + ".yaml")) {}
  ~ConfigFile() override { std::filesystem::remove(path_); }
  std::string Write(const std::string& text) {
    std::ofstream(path_) << text;
    return path_.string();
  }

  const std::filesystem::path path_;
};

TEST(Config, DefaultsNeedNoFlags) {
  const auto config = Load({});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->listen, "unix:/run/clusterkv/clusterkvd.sock");
  EXPECT_EQ(config->attach_socket_path(), "/run/clusterkv/clusterkvd.sock.attach");
  EXPECT_EQ(config->admin_listen, "127.0.0.1:9464");
  EXPECT_EQ(config->host_memory_bytes, 2ull << 30);
  EXPECT_EQ(config->host_memory_dir, "/dev/shm/clusterkv");
  EXPECT_EQ(config->host_chunk_bytes, 64ull << 20);
  EXPECT_EQ(config->host_numa, NumaPlacement::kAuto);
  EXPECT_EQ(config->backend, "auto");
  EXPECT_EQ(config->gpu_memory_bytes, 0u);
  EXPECT_THAT(config->devices, IsEmpty());
  EXPECT_EQ(config->gpu_sharing, gpu::GpuSharing::kVmm);
  EXPECT_EQ(config->threads, 0);
  EXPECT_THAT(config->allow_uids, Optional(ElementsAre(geteuid())));
  EXPECT_FALSE(config->has_many_parties());
  EXPECT_THAT(config->allow_gids, Optional(IsEmpty()));
  EXPECT_EQ(config->max_sessions, 64u);
  EXPECT_EQ(config->max_sequences_per_session, 1024u);
  EXPECT_EQ(config->max_arenas_per_session, 64u);
  EXPECT_EQ(config->drain_timeout, absl::Seconds(10));
  EXPECT_EQ(config->attach_timeout, absl::Seconds(10));
  EXPECT_FALSE(config->device_plugin);
  EXPECT_EQ(config->offered_bytes(), 0u);
  EXPECT_EQ(config->device_plugin_dir, "/var/lib/kubelet/device-plugins");
  EXPECT_EQ(config->grants_dir, "/var/lib/clusterkv/grants");
  EXPECT_EQ(config->log_level, LogLevel::kInfo);
  EXPECT_EQ(config->log_format, LogFormat::kText);
  EXPECT_THAT(config->early_output, IsEmpty());
}

TEST(Config, ReadsEveryKeyFromFlags) {
  const auto config = Load({"--listen",
                            "127.0.0.1:0",
                            "--attach-path=/run/a.sock",
                            "--admin-listen",
                            "[::1]:0",
                            "--admin-allow-remote",
                            "true",
                            "--host-memory",
                            "1gb",
                            "--host-memory-dir=/mnt/huge",
                            "--host-chunk",
                            "32mb",
                            "--host-numa-node=off",
                            "--backend=host",
                            "--gpu-memory",
                            "30gb",
                            "--devices",
                            " GPU-12ab ",
                            "--gpu-sharing=legacy",
                            "--threads",
                            "3",
                            "--allow-uids",
                            "any",
                            "--allow-gids=7,9",
                            "--max-sessions",
                            "2",
                            "--max-sequences-per-session",
                            "3",
                            "--max-arenas-per-session",
                            "4",
                            "--drain-timeout",
                            "1m",
                            "--attach-timeout=500ms",
                            "--poll-time",
                            "50us",
                            "--device-plugin",
                            "--device-plugin-memory",
                            "1gb",
                            "--device-plugin-dir",
                            "/run/plugins",
                            "--grants-dir=/run/grants",
                            "--log-level",
                            "debug",
                            "--log-format",
                            "json"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->listen, "127.0.0.1:0");
  EXPECT_EQ(config->attach_socket_path(), "/run/a.sock");
  EXPECT_EQ(config->admin_listen, "[::1]:0");
  EXPECT_TRUE(config->admin_allow_remote);
  EXPECT_EQ(config->host_memory_bytes, 1ull << 30);
  EXPECT_EQ(config->host_memory_dir, "/mnt/huge");
  EXPECT_EQ(config->host_chunk_bytes, 32ull << 20);
  EXPECT_EQ(config->host_numa, NumaPlacement::kOff);
  EXPECT_EQ(config->backend, "host");
  EXPECT_EQ(config->gpu_memory_bytes, 30ull << 30);
  EXPECT_THAT(config->devices, ElementsAre("GPU-12ab"));
  EXPECT_EQ(config->gpu_sharing, gpu::GpuSharing::kLegacy);
  EXPECT_EQ(config->threads, 3);
  EXPECT_EQ(config->allow_uids, std::nullopt);
  EXPECT_TRUE(config->has_many_parties());
  EXPECT_THAT(config->allow_gids, Optional(ElementsAre(7u, 9u)));
  EXPECT_EQ(config->max_sessions, 2u);
  EXPECT_EQ(config->max_sequences_per_session, 3u);
  EXPECT_EQ(config->max_arenas_per_session, 4u);
  EXPECT_EQ(config->drain_timeout, absl::Minutes(1));
  EXPECT_EQ(config->attach_timeout, absl::Milliseconds(500));
  EXPECT_EQ(config->poll_duration(), absl::Microseconds(50));
  EXPECT_TRUE(config->device_plugin);
  EXPECT_EQ(config->offered_bytes(), 1ull << 30);
  EXPECT_EQ(config->device_plugin_dir, "/run/plugins");
  EXPECT_EQ(config->grants_dir, "/run/grants");
  EXPECT_EQ(config->log_level, LogLevel::kDebug);
  EXPECT_EQ(config->log_format, LogFormat::kJson);
}

TEST_F(ConfigFile, FlagGoesBeforeEnvironmentBeforeFileBeforeDefault) {
  const std::string path =
      Write("host-memory: 1gb\nmax-sessions: 11\nthreads: 1\nlog-format: json\ndevices: 1\n");
  const auto config = Load({"--config", path, "--host-memory=3gb"},
                           {"PATH=/bin", "CLUSTERKV_HOST_MEMORY=2gb", "CLUSTERKV_MAX_SESSIONS=12",
                            "CLUSTERKV_DEVICES=GPU-12ab"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->host_memory_bytes, 3ull << 30);
  EXPECT_EQ(config->max_sessions, 12u);
  EXPECT_THAT(config->devices, ElementsAre("GPU-12ab"));
  EXPECT_EQ(config->threads, 1);
  EXPECT_EQ(config->log_format, LogFormat::kJson);
  EXPECT_EQ(config->max_arenas_per_session, 64u);
}

TEST_F(ConfigFile, IsAlsoNamedByTheEnvironment) {
  const std::string path = Write("max-sessions: 11\n");
  EXPECT_EQ(Load({}, {"CLUSTERKV_CONFIG=" + path})->max_sessions, 11u);
  // The flag names another one.
  EXPECT_FALSE(Load({"--config", path + ".none"}, {"CLUSTERKV_CONFIG=" + path}).ok());
}

TEST_F(ConfigFile, MayBeEmpty) { EXPECT_TRUE(Load({"--config", Write("# nothing\n")}).ok()); }

TEST(Config, ASwitchNeedsNoValueButTakesOne) {
  EXPECT_TRUE(Load({"--device-plugin"})->device_plugin);
  EXPECT_TRUE(Load({"--device-plugin", "--threads=2"})->device_plugin);
  EXPECT_TRUE(Load({"--device-plugin", "true"})->device_plugin);
  EXPECT_FALSE(Load({"--device-plugin=false"})->device_plugin);
  EXPECT_TRUE(Load({}, {"CLUSTERKV_DEVICE_PLUGIN=true"})->device_plugin);
  EXPECT_THAT(Message(Load({"--device-plugin=yes"})),
              AllOf(HasSubstr("--device-plugin"), HasSubstr("'yes' is not true or false")));
  EXPECT_FALSE(Load({"--device-plugin", "--device-plugin"}).ok());
}

TEST(Config, OffersWholeGib) {
  const auto offered = [](Words flags) {
    flags.emplace_back("--device-plugin");
    const auto config = Load(flags);
    EXPECT_TRUE(config.ok()) << config.status();
    return config.ok() ? config->offered_bytes() >> 20 : 0;
  };
  EXPECT_EQ(offered({"--host-memory=3gb"}), 3072u);
  EXPECT_EQ(offered({"--host-memory=3500mb", "--host-chunk=4mb"}), 3072u);
  EXPECT_EQ(offered({"--host-memory=3gb", "--device-plugin-memory=2gb"}), 2048u);
  EXPECT_EQ(offered({"--host-memory=3gb", "--device-plugin-memory=auto"}), 3072u);
  // Several sessions may share a device, so that chunks must be smaller than without.
  EXPECT_EQ(Load({"--host-memory=900gb"})->host_chunk_bytes, 1ull << 30);
  EXPECT_EQ(Load({"--host-memory=900gb", "--device-plugin"})->host_chunk_bytes, 128ull << 20);
}

TEST(Config, RefusesAPoolThatCannotBeOfferedInGib) {
  const std::string longest(92, 'x');
  const std::pair<Words, const char*> cases[] = {
      {{"--host-memory=4gb", "--host-chunk=2gb"}, "host-chunk: 2gb does not divide a GiB"},
      {{"--host-memory=4gb", "--host-chunk=6mb"}, "host-chunk: 6mb does not divide a GiB"},
      {{"--host-memory=1000mb"}, "no whole GiB"},
      {{"--host-memory=4gb", "--device-plugin-memory=5gb"}, "5gb is more than host-memory, 4gb"},
      {{"--host-memory=4gb", "--device-plugin-memory=1500mb"}, "1500mb is not whole GiB"},
      {{"--device-plugin-dir=plugins"}, "device-plugin-dir: 'plugins': the path must be absolute"},
      {{"--grants-dir="}, "grants-dir"},
      {{"--grants-dir=/" + longest.substr(0, 70)}, "grants-dir"},
      {{"--device-plugin-dir=/" + longest}, "device-plugin-dir"},
  };
  for (const auto& [flags, message] : cases) {
    EXPECT_TRUE(Load(flags).ok()) << message;
    Words with = flags;
    with.emplace_back("--device-plugin");
    EXPECT_THAT(Message(Load(with)), HasSubstr(message));
  }
}

TEST(Config, LeavesTheClientsAndTheTestsVariablesAlone) {
  EXPECT_TRUE(Load({}, {"CLUSTERKV_ADDRESS=x", "CLUSTERKV_REQUIRE_CUDA=1", "CLUSTERKV_TEST_SEED=3",
                        "CLUSTERKVD=1", "CLUSTERKV_NO_EQUALS"})
                  .ok());
}

TEST(Config, OpensTheAdminPortOnlyWhenAskedTo) {
  EXPECT_FALSE(Load({})->admin_is_remote());
  EXPECT_FALSE(Load({"--admin-allow-remote=true"})->admin_is_remote());
  for (const char* address : {"0.0.0.0:9464", "[::]:9464", "10.1.2.3:0"}) {
    const auto config = Load({"--admin-allow-remote", "true", "--admin-listen", address});
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_TRUE(config->admin_is_remote());
  }
}

TEST(Config, TakesANumaNodeThatHasMemory) {
  const std::set<int> nodes = gpu::MemoryNodes();
  if (nodes.empty()) GTEST_SKIP() << "the kernel tells of no NUMA nodes";
  const std::string last = std::to_string(*nodes.rbegin());
  const auto config = Load({"--host-numa-node", last});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->host_numa, NumaPlacement::kNode);
  EXPECT_EQ(config->host_numa_node, *nodes.rbegin());
  EXPECT_THAT(EffectiveConfig(*config), Contains(Pair("host-numa-node", last)));
  EXPECT_THAT(Message(Load({"--host-numa-node", "1023"})), HasSubstr(last)) << "names them";
}

struct BadFlags {
  Words flags;
  std::string key;      // that the message names
  std::string allowed;  // what it says besides
};

TEST(Config, BadFlagsAreErrorsThatNameTheKeyAndWhatIsAllowed) {
  const std::vector<BadFlags> cases = {
      {{"--host-memroy", "2gb"}, "--host-memroy", "did you mean 'host-memory'?"},
      {{"--host_memory", "2gb"}, "--host_memory", "did you mean 'host-memory'?"},
      {{"--something-else=1"}, "--something-else", "Known are listen, attach-path, admin-listen"},
      {{"--verbose"}, "--verbose", "Known are"},
      {{"host-memory"}, "host-memory", "--key value or --key=value"},
      {{"-m", "2gb"}, "-m", "--key value or --key=value"},
      {{"--"}, "'--'", "Known are"},
      {{"--host-memory"}, "--host-memory", "value is missing"},
      {{"--config"}, "--config", "value is missing"},
      {{"--listen", "--threads", "2"}, "--listen", "value is missing"},
      {{"--threads=1", "--threads", "2"}, "--threads", "given twice"},
      {{"--config=/a", "--config=/b"}, "--config", "given twice"},
      {{"--config", "/nonexistent/x.yaml"}, "/nonexistent/x.yaml", "config"},
      {{"--host-memory", "2qb"}, "--host-memory", "kb, mb, gb or tb"},
      {{"--host-memory", "-2gb"}, "--host-memory", "kb, mb, gb or tb"},
      {{"--host-memory", ""}, "--host-memory", "kb, mb, gb or tb"},
      {{"--gpu-memory", "half"}, "--gpu-memory", "kb, mb, gb or tb"},
      {{"--host-memory", "auto"}, "--host-memory", "kb, mb, gb or tb"},
      {{"--host-memory", "0"}, "host-memory", "less than one (auto) host-chunk of 16mb"},
      {{"--host-memory", "8mb"}, "host-memory", "less than one (auto) host-chunk of 16mb"},
      {{"--host-memory", "64mb", "--host-chunk", "128mb"}, "host-memory", "host-chunk of 128mb"},
      {{"--host-chunk", "3mb"}, "host-chunk", "multiple of 2mb"},
      {{"--host-memory-dir", "here"}, "host-memory-dir", "absolute"},
      {{"--backend", "rocm"}, "--backend", "auto|host|cuda"},
      {{"--host-numa-node", "1023"}, "--host-numa-node", "a node with memory, which are: "},
      {{"--host-numa-node", "-1"}, "--host-numa-node", "not auto, off or a node"},
      {{"--host-numa-node", "near"}, "--host-numa-node", "not auto, off or a node"},
      {{"--devices", "0,1"}, "--devices", "names 2 GPUs, and a daemon serves one for now"},
      {{"--devices", "GPU-12ab, GPU-12ac,2"}, "--devices", "names 3 GPUs"},
      {{"--devices", "0,"}, "--devices", "empty entry"},
      {{"--devices", " "}, "--devices", "empty entry"},
      {{"--device", "0"}, "--device", "did you mean 'devices'?"},
      {{"--gpu-sharing", "ipc"}, "--gpu-sharing", "vmm|legacy"},
      {{"--threads", "-1"}, "--threads", "from 0 to 1024"},
      {{"--threads", "two"}, "--threads", "from 0 to 1024"},
      {{"--max-sessions", "0"}, "--max-sessions", "from 1 to 65536"},
      {{"--max-sequences-per-session", "9999999"}, "--max-sequences-per-session", "from 1 to"},
      {{"--max-arenas-per-session", "0"}, "--max-arenas-per-session", "from 1 to 65536"},
      {{"--allow-uids", "root"}, "--allow-uids", "write 0,1000"},
      {{"--allow-gids", "1 2"}, "--allow-gids", "write 0,1000"},
      {{"--allow-uids", ""}, "allow-uids", "nobody could attach"},
      {{"--drain-timeout", "10"}, "--drain-timeout", "write 10s"},
      {{"--attach-timeout", "-1s"}, "--attach-timeout", "write 10s"},
      {{"--poll-time", "11ms"}, "--poll-time", "more than 10ms"},
      {{"--poll-time", "fast"}, "--poll-time", "write 10s"},
      {{"--audit-share", "1.5"}, "--audit-share", "from 0 to 1"},
      {{"--audit-share", "nan"}, "--audit-share", "from 0 to 1"},
      {{"--log-level", "loud"}, "--log-level", "debug|info|warning|error"},
      {{"--log-format", "xml"}, "--log-format", "text|json"},
      {{"--listen", "0.0.0.0:7000"}, "listen", "loopback"},
      {{"--listen", "127.evil.example:7000", "--attach-path", "/a"}, "listen", "loopback"},
      {{"--listen", "127.0.0.1:70000", "--attach-path", "/a"}, "listen", "unix:PATH or HOST:PORT"},
      {{"--listen", "127.0.0.1:7000"}, "attach-path", "listen '127.0.0.1:7000'"},
      {{"--listen", "/run/x.sock"}, "listen", "unix:PATH or HOST:PORT"},
      {{"--listen", "unix:x.sock"}, "listen", "absolute"},
      {{"--listen", "unix:"}, "listen", "absolute"},
      {{"--listen", "unix:/" + std::string(120, 'x')}, "listen", "at most 107"},
      // Only what is derived is too long.
      {{"--listen", "unix:/" + std::string(104, 'x')}, "attach-path", "at most 107"},
      {{"--attach-path", "here"}, "attach-path", "absolute"},
      {{"--listen", "unix:/a", "--attach-path", "/a"}, "attach-path", "listen socket"},
      {{"--admin-listen", "0.0.0.0:9464"}, "admin-listen", "admin-allow-remote"},
      {{"--admin-listen", "0.0.0.0:9464", "--admin-allow-remote=false"},
       "admin-listen",
       "loopback"},
      {{"--admin-listen", "node1:9464", "--admin-allow-remote=true"}, "admin-listen", "in numbers"},
      {{"--admin-listen", "[::x]:9464", "--admin-allow-remote=true"}, "admin-listen", "in numbers"},
      {{"--admin-listen", "0.0.0.0", "--admin-allow-remote=true"}, "admin-listen", "HOST:PORT"},
      {{"--admin-allow-remote", "yes"}, "--admin-allow-remote", "true or false"},
      {{"--listen", "0.0.0.0:7000", "--attach-path", "/a", "--admin-allow-remote=true"},
       "listen",
       "loopback"},
      {{"--admin-listen", "9464"}, "admin-listen", "HOST:PORT"},
      {{"--admin-listen", "127.0.0.1:http"}, "admin-listen", "HOST:PORT"},
      {{"--admin-listen", "unix:/run/x"}, "admin-listen", "HOST:PORT"},
  };
  for (const BadFlags& bad : cases) {
    const auto config = Load(bad.flags);
    ASSERT_FALSE(config.ok()) << testing::PrintToString(bad.flags);
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Message(config), AllOf(HasSubstr(bad.key), HasSubstr(bad.allowed)))
        << testing::PrintToString(bad.flags);
  }
}

TEST(Config, BadVariablesAreErrorsThatNameThem) {
  EXPECT_THAT(Message(Load({}, {"CLUSTERKV_HOST_MEMROY=2gb"})),
              AllOf(HasSubstr("environment"), HasSubstr("CLUSTERKV_HOST_MEMROY"),
                    HasSubstr("did you mean 'host-memory'?")));
  EXPECT_THAT(Message(Load({}, {"CLUSTERKV_HOST_MEMORY=much"})),
              AllOf(HasSubstr("environment"), HasSubstr("CLUSTERKV_HOST_MEMORY"),
                    HasSubstr("kb, mb, gb or tb")));
  // Also where a flag would win.
  EXPECT_FALSE(Load({"--threads=1"}, {"CLUSTERKV_THREADS=x"}).ok());
}

TEST_F(ConfigFile, BadFilesAreErrorsThatNameFileAndKey) {
  const std::map<std::string, std::string> cases = {
      {"host-memroy: 2gb\n", "did you mean 'host-memory'?"},
      {"host_memory: 2gb\n", "did you mean 'host-memory'?"},
      {"host-memory: much\n", "host-memory: 'much'"},
      {"threads: 1\nthreads: 2\n", "threads is given twice"},
      {"threads: [1, 2]\n", "threads must have one value"},
      {"threads: {a: 1}\n", "threads must have one value"},
      {"threads:\n", "threads must have one value"},
      {"[a, b]: 1\n", "a key is no word"},
      {"- threads\n", "must map keys to values"},
      {"just words\n", "must map keys to values"},
      {"threads: [1\n", "config: "},
      {"config: /other.yaml\n", "unknown key 'config'"},
  };
  for (const auto& [text, message] : cases) {
    const std::string path = Write(text);
    const auto config = Load({"--config", path});
    ASSERT_FALSE(config.ok()) << text;
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Message(config), AllOf(HasSubstr(path), HasSubstr(message))) << text;
  }
}

TEST(Config, AutoChunkIsAPowerOfTwoWithinBounds) {
  const std::map<std::string, uint64_t> chunks = {{"64mb", 16ull << 20},
                                                  {"1gb", 32ull << 20},
                                                  {"3gb", 64ull << 20},
                                                  {"100gb", 2ull << 30 >> 1},
                                                  {"700gb", 1ull << 30}};
  for (const auto& [memory, chunk] : chunks) {
    EXPECT_EQ(Load({"--host-memory", memory})->host_chunk_bytes, chunk) << memory;
  }
}

TEST(Config, EffectiveConfigSaysThatHostMemoryWasRoundedDown) {
  const auto config = Load({"--host-memory", "70mb", "--host-chunk", "16mb"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->host_memory_bytes, 64ull << 20);
  std::map<std::string, std::string> values;
  for (const auto& [key, value] : EffectiveConfig(*config)) values[key] = value;
  EXPECT_EQ(values["host-memory"], "64mb (rounded down from 70mb to whole chunks)");
}

TEST_F(ConfigFile, EffectiveConfigIsReadBackAsItself) {
  const auto config = Load({"--allow-uids=any", "--allow-gids=5,6", "--drain-timeout=90s"});
  std::string yaml;
  for (const auto& [key, value] : EffectiveConfig(*config)) yaml += key + ": " + value + "\n";
  const auto again = Load({"--config", Write(yaml)});
  ASSERT_TRUE(again.ok()) << again.status() << "\n" << yaml;
  EXPECT_EQ(EffectiveConfig(*again), EffectiveConfig(*config));
}

TEST(Config, HelpAndVersionComeBeforeEverythingElse) {
  const auto help = Load({"--threads=x", "--help"});
  ASSERT_TRUE(help.ok()) << help.status();
  for (const auto& [key, value] : EffectiveConfig(*Load({}))) {
    EXPECT_THAT(help->early_output, HasSubstr("--" + key + " "));
  }
  EXPECT_THAT(help->early_output, AllOf(HasSubstr("--config "), HasSubstr("[2gb]"),
                                        HasSubstr("auto|host|cuda"), Not(HasSubstr("\t"))));
  EXPECT_EQ(Load({"--version"})->early_output, "clusterkvd " CLUSTERKV_VERSION "\n");
}

TEST(Config, HelpIsAlsoAPage) {
  const auto page = Load({"--help=markdown"});
  ASSERT_TRUE(page.ok()) << page.status();
  for (const auto& [key, value] : EffectiveConfig(*Load({}))) {
    EXPECT_THAT(page->early_output, HasSubstr("| `" + key + "` | `CLUSTERKV_"));
  }
  EXPECT_THAT(page->early_output,
              AllOf(HasSubstr("| `host-memory` | `CLUSTERKV_HOST_MEMORY` | size | `2gb` |"),
                    HasSubstr("auto\\|host\\|cuda"), HasSubstr("the daemon's own uid")));
  EXPECT_EQ(Load({"--help=html"}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace clusterkv::service
