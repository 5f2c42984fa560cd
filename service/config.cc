#include "service/config.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <sys/un.h>
#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <string_view>
#include <thread>

#include "absl/strings/numbers.h"
#include "gpu/status_macros.h"
#include "service/config_help.h"
#include "service/config_keys.h"
#include "service/size_text.h"
#include "service/version.h"

namespace clusterkv::service {
namespace {

constexpr char kUnixPrefix[] = "unix:";
constexpr uint64_t kSmallestAutoChunk = 16ull << 20;
constexpr uint64_t kLargestAutoChunk = 1ull << 30;
// A chunk is lent whole to one session, and sessions may share one GiB.
constexpr uint64_t kLargestAutoChunkOfDevices = 128ull << 20;
constexpr uint64_t kChunkAlignment = 2ull << 20;  // one huge page
constexpr size_t kLongestSocketPath = sizeof(sockaddr_un::sun_path) - 1;
// Names of sockets below a folder, in bytes.
constexpr size_t kLongestPluginSocket = std::string_view("clusterkv.sock").size();
constexpr size_t kLongestGrantSocket =
    std::string_view("0123456789abcdef/clusterkvd.sock.attach").size();

// One `key = value` as someone wrote it.
struct Setting {
  std::string name;     // kebab-case
  std::string written;  // as it stands there: --host-memory, CLUSTERKV_HOST_MEMORY, host-memory
  std::string value;
};
using Settings = std::vector<Setting>;

absl::Status Bad(const std::string& message) { return absl::InvalidArgumentError(message); }

bool Holds(const Settings& settings, const std::string& name) {
  return std::ranges::any_of(settings, [&](const Setting& one) { return one.name == name; });
}

absl::Status Apply(const Settings& settings, const std::string& origin, Config& config) {
  for (const Setting& setting : settings) {
    const auto key = FindConfigKey(setting.name, setting.written);
    if (!key.ok()) return Bad(fmt::format("{}: {}", origin, std::string(key.status().message())));
    if (absl::Status bad = (*key)->set(config, setting.value); !bad.ok()) {
      return Bad(fmt::format("{}: {}: {}", origin, setting.written, std::string(bad.message())));
    }
  }
  return absl::OkStatus();
}

struct Flags {
  Settings settings;
  std::optional<std::string> config_file;
  enum class Help { kNone, kText, kMarkdown };
  Help help = Help::kNone;
  bool version = false;
};

absl::StatusOr<Flags> ReadFlags(int argc, const char* const* argv) {
  Flags flags;
  for (int i = 1; i < argc; ++i) {
    std::string text = argv[i];
    if (text == "--help" || text == "-h") {
      flags.help = Flags::Help::kText;
      continue;
    }
    if (text == "--help=markdown") {
      flags.help = Flags::Help::kMarkdown;
      continue;
    }
    if (text == "--version") {
      flags.version = true;
      continue;
    }
    if (!text.starts_with("--")) {
      return Bad(fmt::format("flags: '{}' is none; write --key value or --key=value", text));
    }
    std::string value;
    if (const size_t equals = text.find('='); equals != std::string::npos) {
      value = text.substr(equals + 1);
      text.resize(equals);
    } else if (i + 1 < argc && !std::string(argv[i + 1]).starts_with("--")) {
      value = argv[++i];
    } else {
      // An unknown key is the better news.
      const std::string name = text.substr(2);
      if (name != "config") {
        CKV_ASSIGN_OR_RETURN(const ConfigKey* key, FindConfigKey(name, text));
        value = key->bare;
      }
      if (value.empty()) return Bad(fmt::format("flags: {}: its value is missing", text));
    }
    const std::string name = text.substr(2);
    if (Holds(flags.settings, name) || (name == "config" && flags.config_file)) {
      return Bad(fmt::format("flags: {} is given twice", text));
    }
    if (name == "config") {
      flags.config_file = value;
    } else {
      flags.settings.push_back({.name = name, .written = text, .value = value});
    }
  }
  return flags;
}

// The configuration file's name goes to `config_file`, if a flag has not set it.
Settings ReadEnvironment(const char* const* environment, std::optional<std::string>& config_file) {
  Settings settings;
  for (; *environment != nullptr; ++environment) {
    const std::string entry = *environment;
    const size_t equals = entry.find('=');
    if (!entry.starts_with(kEnvironmentPrefix) || equals == std::string::npos) continue;
    const std::string written = entry.substr(0, equals);
    std::string name = written.substr(sizeof(kEnvironmentPrefix) - 1);
    // Of the client and of the tests.
    if (name == "ADDRESS" || name == "REQUIRE_CUDA" || name.starts_with("TEST_")) continue;
    for (char& c : name) c = c == '_' ? '-' : static_cast<char>(std::tolower(c));
    const std::string value = entry.substr(equals + 1);
    if (name == "config") {
      if (!config_file) config_file = value;
    } else {
      settings.push_back({.name = name, .written = written, .value = value});
    }
  }
  return settings;
}

absl::StatusOr<Settings> ReadFile(const std::string& path) {
  YAML::Node root;
  try {  // yaml-cpp knows no other way
    root = YAML::LoadFile(path);
  } catch (const YAML::Exception& error) {
    return Bad(fmt::format("config: {}: {}", path, error.what()));
  }
  Settings settings;
  if (root.IsNull()) return settings;
  if (!root.IsMap()) return Bad(fmt::format("config: {}: it must map keys to values", path));
  for (const auto& entry : root) {
    if (!entry.first.IsScalar()) return Bad(fmt::format("config: {}: a key is no word", path));
    const std::string name = entry.first.Scalar();
    if (Holds(settings, name)) {
      return Bad(fmt::format("config: {}: {} is given twice", path, name));
    }
    if (!entry.second.IsScalar()) {
      return Bad(fmt::format("config: {}: {} must have one value", path, name));
    }
    settings.push_back({.name = name, .written = name, .value = entry.second.Scalar()});
  }
  return settings;
}

bool IsLoopback(const std::string& host) {
  if (host == "localhost" || host == "[::1]") return true;
  in_addr address{};
  return inet_pton(AF_INET, host.c_str(), &address) == 1 && ntohl(address.s_addr) >> 24 == 127;
}

std::string HostOf(const std::string& address) { return address.substr(0, address.rfind(':')); }

// An address by number: a name may come to mean another interface.
bool IsNumeric(const std::string& host) {
  in_addr v4{};
  in6_addr v6{};
  if (host.starts_with('[') && host.ends_with(']')) {
    return inet_pton(AF_INET6, host.substr(1, host.size() - 2).c_str(), &v6) == 1;
  }
  return inet_pton(AF_INET, host.c_str(), &v4) == 1;
}

absl::Status CheckPort(const std::string& key, const std::string& address,
                       const std::string& allowed) {
  const size_t colon = address.rfind(':');
  int port = -1;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port) ||
      port < 0 || port > 65535) {
    return Bad(fmt::format("{}: '{}' is not {}", key, address, allowed));
  }
  return absl::OkStatus();
}

absl::Status NotLoopback(const std::string& key, const std::string& address,
                         const std::string& why) {
  return Bad(fmt::format("{}: '{}' is not a loopback address (127.0.0.1, localhost, [::1]); {}",
                         key, address, why));
}

absl::Status CheckAdmin(const Config& config) {
  CKV_RETURN_IF_ERROR(CheckPort("admin-listen", config.admin_listen, "HOST:PORT"));
  if (!config.admin_is_remote()) return absl::OkStatus();
  if (!config.admin_allow_remote) {
    return NotLoopback("admin-listen", config.admin_listen,
                       "it changes nothing and tells no secrets, but whoever reaches it may read "
                       "it: with admin-allow-remote true other addresses are allowed");
  }
  if (!IsNumeric(HostOf(config.admin_listen))) {
    return Bad(fmt::format("admin-listen: '{}': write the address in numbers (0.0.0.0, [::])",
                           config.admin_listen));
  }
  return absl::OkStatus();
}

absl::Status CheckGrpcTcp(const Config& config) {
  CKV_RETURN_IF_ERROR(CheckPort("listen", config.listen, "unix:PATH or HOST:PORT"));
  if (!IsLoopback(HostOf(config.listen))) {
    return NotLoopback("listen", config.listen, "TCP is neither encrypted nor authenticated yet");
  }
  return absl::OkStatus();
}

absl::Status CheckSocketPath(const std::string& key, const std::string& path) {
  if (path.empty() || path.front() != '/') {
    return Bad(fmt::format("{}: '{}': the path must be absolute", key, path));
  }
  if (path.size() > kLongestSocketPath) {
    return Bad(fmt::format("{}: '{}' has {} bytes, a socket's path at most {}", key, path,
                           path.size(), kLongestSocketPath));
  }
  return absl::OkStatus();
}

absl::Status CheckAddresses(const Config& config) {
  CKV_RETURN_IF_ERROR(CheckAdmin(config));
  if (config.listen.starts_with(kUnixPrefix)) {
    CKV_RETURN_IF_ERROR(CheckSocketPath("listen", config.listen.substr(sizeof(kUnixPrefix) - 1)));
  } else {
    CKV_RETURN_IF_ERROR(CheckGrpcTcp(config));
    if (config.attach_path.empty()) {
      return Bad(
          fmt::format("attach-path: needed with listen '{}': the attach socket is always a file",
                      config.listen));
    }
  }
  CKV_RETURN_IF_ERROR(CheckSocketPath("attach-path", config.attach_socket_path()));
  if (config.listen == kUnixPrefix + config.attach_socket_path()) {
    return Bad(fmt::format("attach-path: '{}' is the listen socket", config.attach_path));
  }
  return absl::OkStatus();
}

absl::Status CheckAccess(const Config& config) {
  if (config.allow_uids && config.allow_gids && config.allow_uids->empty() &&
      config.allow_gids->empty()) {
    return Bad("allow-uids, allow-gids: both are empty, so that nobody could attach");
  }
  return absl::OkStatus();
}

absl::Status FinishMemory(Config& config) {
  if (config.host_memory_dir.empty() || config.host_memory_dir.front() != '/') {
    return Bad(
        fmt::format("host-memory-dir: '{}': the path must be absolute", config.host_memory_dir));
  }
  const bool chosen = config.host_chunk_bytes == 0;
  if (chosen) {
    config.host_chunk_bytes =
        AutoHostChunk(config.host_memory_bytes,
                      config.device_plugin ? ChunkUsers::kContainers : ChunkUsers::kSessions);
  }
  const std::string chunk = SizeText(config.host_chunk_bytes);
  if (config.host_chunk_bytes % kChunkAlignment != 0) {
    return Bad(
        fmt::format("host-chunk: {} is not a multiple of {}", chunk, SizeText(kChunkAlignment)));
  }
  if (config.host_memory_bytes < config.host_chunk_bytes) {
    return Bad(fmt::format("host-memory: {} is less than one {}host-chunk of {}",
                           SizeText(config.host_memory_bytes), chosen ? "(auto) " : "", chunk));
  }
  config.host_memory_bytes -= config.host_memory_bytes % config.host_chunk_bytes;
  return absl::OkStatus();
}

absl::Status CheckFolder(const std::string& key, const std::string& path, size_t longest_name) {
  if (path.empty() || path.front() != '/') {
    return Bad(fmt::format("{}: '{}': the path must be absolute", key, path));
  }
  const size_t longest = kLongestSocketPath - 1 - longest_name;
  if (path.size() > longest) {
    return Bad(
        fmt::format("{}: '{}' has {} bytes, at most {}, or the sockets in it would have more "
                    "than {}",
                    key, path, path.size(), longest, kLongestSocketPath));
  }
  return absl::OkStatus();
}

absl::Status CheckDevicePlugin(const Config& config) {
  if (!config.device_plugin) return absl::OkStatus();
  CKV_RETURN_IF_ERROR(
      CheckFolder("device-plugin-dir", config.device_plugin_dir, kLongestPluginSocket));
  CKV_RETURN_IF_ERROR(CheckFolder("grants-dir", config.grants_dir, kLongestGrantSocket));
  const uint64_t chunk = config.host_chunk_bytes;
  if (chunk > kDeviceBytes || kDeviceBytes % chunk != 0) {
    return Bad(
        fmt::format("host-chunk: {} does not divide a GiB: chunks are lent whole, so that a "
                    "container could not use all of its clusterkv.io/host-gib",
                    SizeText(chunk)));
  }
  if (config.device_plugin_memory_bytes % kDeviceBytes != 0) {
    return Bad(fmt::format("device-plugin-memory: {} is not whole GiB",
                           SizeText(config.device_plugin_memory_bytes)));
  }
  if (config.device_plugin_memory_bytes > config.host_memory_bytes) {
    return Bad(fmt::format("device-plugin-memory: {} is more than host-memory, {}",
                           SizeText(config.device_plugin_memory_bytes),
                           SizeText(config.host_memory_bytes)));
  }
  if (config.offered_bytes() == 0) {
    return Bad(fmt::format("device-plugin: host-memory {} has no whole GiB to offer",
                           SizeText(config.host_memory_bytes)));
  }
  return absl::OkStatus();
}

Config Defaults() {
  Config config;
  config.allow_uids = std::set<uint32_t>{geteuid()};
  config.allow_gids = std::set<uint32_t>{};
  return config;
}

}  // namespace

std::string Config::attach_socket_path() const {
  if (!attach_path.empty()) return attach_path;
  return listen.substr(sizeof(kUnixPrefix) - 1) + ".attach";
}

bool Config::has_many_parties() const {
  return device_plugin || !allow_uids || !allow_gids || !allow_gids->empty() ||
         allow_uids->size() > 1;
}

absl::Duration Config::poll_duration() const {
  constexpr unsigned kSpareCores = 8;
  if (poll_time) return *poll_time;
  return std::thread::hardware_concurrency() >= kSpareCores ? absl::Milliseconds(1)
                                                            : absl::ZeroDuration();
}

uint64_t AutoHostChunk(uint64_t host_memory_bytes, ChunkUsers users) {
  return std::clamp(
      std::bit_floor(host_memory_bytes / 32), kSmallestAutoChunk,
      users == ChunkUsers::kContainers ? kLargestAutoChunkOfDevices : kLargestAutoChunk);
}

bool Config::admin_is_remote() const { return !IsLoopback(HostOf(admin_listen)); }

uint64_t Config::offered_bytes() const {
  if (!device_plugin) return 0;
  if (device_plugin_memory_bytes > 0) return device_plugin_memory_bytes;
  return host_memory_bytes - host_memory_bytes % kDeviceBytes;
}

absl::StatusOr<Config> LoadConfig(int argc, const char* const* argv,
                                  const char* const* environment) {
  CKV_ASSIGN_OR_RETURN(Flags flags, ReadFlags(argc, argv));
  Config config = Defaults();
  if (flags.help != Flags::Help::kNone) {
    config.early_output =
        flags.help == Flags::Help::kText ? HelpText(config) : HelpMarkdown(config);
    return config;
  }
  if (flags.version) {
    config.early_output = fmt::format("clusterkvd {}\n", kVersion);
    return config;
  }
  const Settings variables = ReadEnvironment(environment, flags.config_file);
  if (flags.config_file) {
    CKV_ASSIGN_OR_RETURN(const Settings file, ReadFile(*flags.config_file));
    CKV_RETURN_IF_ERROR(Apply(file, fmt::format("config: {}", *flags.config_file), config));
  }
  CKV_RETURN_IF_ERROR(Apply(variables, "environment", config));
  CKV_RETURN_IF_ERROR(Apply(flags.settings, "flags", config));
  CKV_RETURN_IF_ERROR(CheckAddresses(config));
  CKV_RETURN_IF_ERROR(CheckAccess(config));
  config.requested_host_memory_bytes = config.host_memory_bytes;
  CKV_RETURN_IF_ERROR(FinishMemory(config));
  CKV_RETURN_IF_ERROR(CheckDevicePlugin(config));
  return config;
}

std::vector<std::pair<std::string, std::string>> EffectiveConfig(const Config& config) {
  std::vector<std::pair<std::string, std::string>> values;
  for (const ConfigKey& key : ConfigKeys()) {
    std::string value = key.get(config);
    if (key.name == "attach-path") value = config.attach_socket_path();
    if (key.name == "host-memory" &&
        config.requested_host_memory_bytes != config.host_memory_bytes) {
      value += fmt::format(" (rounded down from {} to whole chunks)",
                           SizeText(config.requested_host_memory_bytes));
    }
    values.emplace_back(key.name, value.empty() ? "\"\"" : value);  // as a file would say it
  }
  return values;
}

}  // namespace clusterkv::service
