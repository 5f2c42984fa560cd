#include "service/config.h"

#include <fmt/format.h>
#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "gpu/status_macros.h"
#include "service/size_text.h"
#include "service/version.h"

namespace clusterkv::service {
namespace {

constexpr char kUnixPrefix[] = "unix:";
constexpr char kEnvironmentPrefix[] = "CLUSTERKV_";
constexpr uint64_t kSmallestChunk = 16ull << 20;
constexpr uint64_t kLargestAutoChunk = 1ull << 30;
constexpr uint64_t kChunkAlignment = 2ull << 20;

// Set says why a value is bad; Get writes it as it would be read.
struct Key {
  std::string name;
  std::string type;
  std::string help;
  std::function<absl::Status(Config&, const std::string&)> set;
  std::function<std::string(const Config&)> get;
};

Key TextKey(std::string name, std::string type, std::string help, std::string Config::*field) {
  return {std::move(name), std::move(type), std::move(help),
          [field](Config& config, const std::string& text) {
            config.*field = text;
            return absl::OkStatus();
          },
          [field](const Config& config) { return config.*field; }};
}

Key ChoiceKey(std::string name, std::vector<std::string> choices, std::string help,
              std::function<void(Config&, size_t)> set, std::function<size_t(const Config&)> get) {
  const std::string type = absl::StrJoin(choices, "|");
  return {std::move(name), type, std::move(help),
          [choices, set, type](Config& config, const std::string& text) -> absl::Status {
            const auto found = std::ranges::find(choices, text);
            if (found == choices.end()) {
              return absl::InvalidArgumentError(fmt::format("'{}' is not one of {}", text, type));
            }
            set(config, static_cast<size_t>(found - choices.begin()));
            return absl::OkStatus();
          },
          [choices, get](const Config& config) { return choices[get(config)]; }};
}

Key SizeKey(std::string name, std::string help, uint64_t Config::*field, std::string zero) {
  return {std::move(name), "size", std::move(help),
          [field, zero](Config& config, const std::string& text) -> absl::Status {
            if (!zero.empty() && text == zero) {
              config.*field = 0;
              return absl::OkStatus();
            }
            CKV_ASSIGN_OR_RETURN(config.*field, ParseSize(text));
            return absl::OkStatus();
          },
          [field, zero](const Config& config) {
            return config.*field == 0 && !zero.empty() ? zero : SizeText(config.*field);
          }};
}

template <typename T>
Key CountKey(std::string name, std::string help, T Config::*field, T low, T high) {
  return {std::move(name), "number", std::move(help),
          [field, low, high](Config& config, const std::string& text) -> absl::Status {
            int64_t value = 0;
            if (!absl::SimpleAtoi(text, &value) || value < low || value > high) {
              return absl::InvalidArgumentError(
                  fmt::format("'{}' is not a number from {} to {}", text, low, high));
            }
            config.*field = static_cast<T>(value);
            return absl::OkStatus();
          },
          [field](const Config& config) { return std::to_string(config.*field); }};
}

Key DurationKey(std::string name, std::string help, absl::Duration Config::*field) {
  return {std::move(name), "duration", std::move(help),
          [field](Config& config, const std::string& text) -> absl::Status {
            CKV_ASSIGN_OR_RETURN(config.*field, ParseDuration(text));
            return absl::OkStatus();
          },
          [field](const Config& config) { return absl::FormatDuration(config.*field); }};
}

Key IdsKey(std::string name, std::string help, std::optional<std::set<uint32_t>> Config::*field) {
  return {std::move(name), "ids|any", std::move(help),
          [field](Config& config, const std::string& text) -> absl::Status {
            if (text == "any") {
              config.*field = std::nullopt;
              return absl::OkStatus();
            }
            CKV_ASSIGN_OR_RETURN(config.*field, ParseIdList(text));
            return absl::OkStatus();
          },
          [field](const Config& config) {
            return config.*field ? fmt::format("{}", fmt::join(*(config.*field), ",")) : "any";
          }};
}

const std::vector<Key>& Keys() {
  static const std::vector<Key> keys = [] {
    std::vector<Key> made;
    made.push_back(TextKey("listen", "address",
                           "gRPC: unix:PATH (made with mode 0660), or a loopback HOST:PORT",
                           &Config::listen));
    made.push_back(TextKey("attach-path", "path",
                           "attach socket; default: the UNIX socket's path with .attach",
                           &Config::attach_path));
    made.push_back(TextKey("admin-listen", "address",
                           "health, metrics and status over HTTP: a loopback HOST:PORT; port 0 "
                           "picks one",
                           &Config::admin_listen));
    made.push_back(SizeKey("host-memory", "pinned host memory for KV, taken in full at start",
                           &Config::host_memory_bytes, ""));
    made.push_back(TextKey("host-memory-dir", "path",
                           "its directory, on tmpfs or hugetlbfs; set to 0700",
                           &Config::host_memory_dir));
    made.push_back(SizeKey("host-chunk",
                           "piece of it that is lent whole to one session; auto: host-memory / 32, "
                           "16mb to 1gb",
                           &Config::host_chunk_bytes, "auto"));
    static const std::vector<std::string> backends{"auto", "host", "cuda"};
    made.push_back(ChoiceKey(
        "backend", backends, "where device work runs; auto: cuda if it is there",
        [](Config& config, size_t i) { config.backend = backends[i]; },
        [](const Config& config) {
          return static_cast<size_t>(std::ranges::find(backends, config.backend) -
                                     backends.begin());
        }));
    made.push_back(
        SizeKey("gpu-memory", "bound on device memory; 0: none", &Config::gpu_memory_bytes, "0"));
    made.push_back(
        CountKey<int>("threads", "of the host backend; 0: all cores", &Config::threads, 0, 1024));
    made.push_back(IdsKey("allow-uids", "uids that may attach", &Config::allow_uids));
    made.push_back(
        IdsKey("allow-gids", "gids that may attach; either list is enough", &Config::allow_gids));
    made.push_back(CountKey<uint32_t>("max-sessions", "open at the same time",
                                      &Config::max_sessions, 1, 65536));
    made.push_back(CountKey<uint32_t>("max-sequences-per-session", "registered at the same time",
                                      &Config::max_sequences_per_session, 1, 1u << 20));
    made.push_back(CountKey<uint32_t>("max-arenas-per-session", "rings and buffers",
                                      &Config::max_arenas_per_session, 1, 65536));
    made.push_back(DurationKey("drain-timeout", "after SIGTERM, before sessions are ended",
                               &Config::drain_timeout));
    made.push_back(
        DurationKey("attach-timeout", "for a new session to attach", &Config::attach_timeout));
    made.push_back(ChoiceKey(
        "log-level", {"debug", "info", "warning", "error"}, "least severe that is logged",
        [](Config& config, size_t i) { config.log_level = static_cast<LogLevel>(i); },
        [](const Config& config) { return static_cast<size_t>(config.log_level); }));
    made.push_back(ChoiceKey(
        "log-format", {"text", "json"}, "of the log on stderr",
        [](Config& config, size_t i) { config.log_format = static_cast<LogFormat>(i); },
        [](const Config& config) { return static_cast<size_t>(config.log_format); }));
    return made;
  }();
  return keys;
}

size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t changed = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({changed, row[j] + 1, row[j - 1] + 1}));
    }
  }
  return row[b.size()];
}

absl::StatusOr<const Key*> FindKey(const std::string& name, const std::string& origin) {
  const Key* nearest = nullptr;
  size_t best = 4;  // further away is no typing error
  for (const Key& key : Keys()) {
    if (key.name == name) return &key;
    const size_t distance = EditDistance(key.name, name);
    if (distance < best) {
      best = distance;
      nearest = &key;
    }
  }
  std::vector<std::string> names;
  for (const Key& key : Keys()) names.push_back(key.name);
  return absl::InvalidArgumentError(fmt::format(
      "{}: unknown key '{}'{}; known are {}", origin, name,
      nearest != nullptr ? fmt::format(", did you mean '{}'", nearest->name) : std::string(),
      absl::StrJoin(names, ", ")));
}

absl::Status Set(Config& config, const std::string& name, const std::string& value,
                 const std::string& origin) {
  CKV_ASSIGN_OR_RETURN(const Key* const key, FindKey(name, origin));
  if (absl::Status bad = key->set(config, value); !bad.ok()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: {}: {}", origin, name, std::string(bad.message())));
  }
  return absl::OkStatus();
}

// --- Sources ----------------------------------------------------------------------------------

using Values = std::map<std::string, std::string>;  // name -> value

struct Flags {
  Values values;
  std::optional<std::string> config_file;
  bool help = false, version = false;
};

absl::StatusOr<Flags> ReadFlags(int argc, const char* const* argv) {
  Flags flags;
  for (int i = 1; i < argc; ++i) {
    std::string text = argv[i];
    if (text == "--help" || text == "-h") {
      flags.help = true;
      continue;
    }
    if (text == "--version") {
      flags.version = true;
      continue;
    }
    if (!text.starts_with("--")) {
      return absl::InvalidArgumentError(
          fmt::format("'{}' is not a flag; flags are --key value or --key=value", text));
    }
    text.erase(0, 2);
    std::string value;
    if (const size_t equals = text.find('='); equals != std::string::npos) {
      value = text.substr(equals + 1);
      text.resize(equals);
    } else if (i + 1 < argc) {
      value = argv[++i];
    } else {
      return absl::InvalidArgumentError(fmt::format("flag: {}: its value is missing", text));
    }
    if (text == "config") {
      flags.config_file = value;
      continue;
    }
    if (!flags.values.emplace(text, value).second) {
      return absl::InvalidArgumentError(fmt::format("flag: {} is given twice", text));
    }
  }
  return flags;
}

absl::StatusOr<Values> ReadEnvironment(const char* const* environment,
                                       std::optional<std::string>& config_file) {
  Values values;
  for (; *environment != nullptr; ++environment) {
    const std::string entry = *environment;
    if (!entry.starts_with(kEnvironmentPrefix)) continue;
    const size_t equals = entry.find('=');
    std::string name =
        entry.substr(sizeof(kEnvironmentPrefix) - 1, equals - (sizeof(kEnvironmentPrefix) - 1));
    // Of the client and of the tests.
    if (name == "ADDRESS" || name == "REQUIRE_CUDA" || name.starts_with("TEST_")) continue;
    for (char& c : name) c = c == '_' ? '-' : static_cast<char>(std::tolower(c));
    const std::string value = entry.substr(equals + 1);
    if (name == "config") {
      if (!config_file) config_file = value;
      continue;
    }
    values[name] = value;
  }
  return values;
}

absl::StatusOr<Values> ReadFile(const std::string& path) {
  const auto fail = [&](const std::string& what) {
    return absl::InvalidArgumentError(fmt::format("config: {}: {}", path, what));
  };
  YAML::Node root;
  try {  // yaml-cpp knows no other way
    root = YAML::LoadFile(path);
  } catch (const YAML::Exception& error) {
    return fail(error.what());
  }
  Values values;
  if (root.IsNull()) return values;
  if (!root.IsMap()) return fail("it must be a map of keys to values");
  for (const auto& entry : root) {
    const std::string name = entry.first.Scalar();
    if (!entry.second.IsScalar()) return fail(fmt::format("{} must be a single value", name));
    if (!values.emplace(name, entry.second.Scalar()).second) {
      return fail(fmt::format("{} is given twice", name));
    }
  }
  return values;
}

// --- What fits together -----------------------------------------------------------------------

absl::Status CheckAddress(const std::string& key, const std::string& address, bool unix_allowed) {
  if (unix_allowed && address.starts_with(kUnixPrefix)) {
    const std::string path = address.substr(sizeof(kUnixPrefix) - 1);
    if (path.empty() || path.front() != '/') {
      return absl::InvalidArgumentError(
          fmt::format("{}: '{}': the path must be absolute", key, address));
    }
    return absl::OkStatus();
  }
  const size_t colon = address.rfind(':');
  int port = -1;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port) ||
      port < 0 || port > 65535) {
    return absl::InvalidArgumentError(fmt::format("{}: '{}' is not {}HOST:PORT", key, address,
                                                  unix_allowed ? "unix:PATH or " : ""));
  }
  const std::string host = address.substr(0, colon);
  if (!host.starts_with("127.") && host != "localhost" && host != "[::1]") {
    return absl::InvalidArgumentError(
        fmt::format("{}: '{}' is not a loopback address (127.0.0.1, localhost or [::1]); there is "
                    "no encryption on TCP",
                    key, address));
  }
  return absl::OkStatus();
}

absl::Status Finish(Config& config) {
  CKV_RETURN_IF_ERROR(CheckAddress("listen", config.listen, true));
  CKV_RETURN_IF_ERROR(CheckAddress("admin-listen", config.admin_listen, false));
  if (!config.listen.starts_with(kUnixPrefix) && config.attach_path.empty()) {
    return absl::InvalidArgumentError(
        "attach-path: needed with a TCP listen address, the attach socket is always a file");
  }
  if (config.host_memory_dir.empty() || config.host_memory_dir.front() != '/') {
    return absl::InvalidArgumentError(
        fmt::format("host-memory-dir: '{}' must be absolute", config.host_memory_dir));
  }
  if (config.host_memory_bytes < kSmallestChunk) {
    return absl::InvalidArgumentError(fmt::format("host-memory: {} is below {}",
                                                  SizeText(config.host_memory_bytes),
                                                  SizeText(kSmallestChunk)));
  }
  if (config.host_chunk_bytes == 0) {
    config.host_chunk_bytes = std::clamp(std::bit_floor(config.host_memory_bytes / 32),
                                         kSmallestChunk, kLargestAutoChunk);
  }
  if (config.host_chunk_bytes % kChunkAlignment != 0) {
    return absl::InvalidArgumentError(fmt::format("host-chunk: {} is not a multiple of {}",
                                                  SizeText(config.host_chunk_bytes),
                                                  SizeText(kChunkAlignment)));
  }
  if (config.host_chunk_bytes > config.host_memory_bytes) {
    return absl::InvalidArgumentError(fmt::format("host-chunk: {} is above host-memory, {}",
                                                  SizeText(config.host_chunk_bytes),
                                                  SizeText(config.host_memory_bytes)));
  }
  config.attach_path = config.attach_socket_path();
  config.host_memory_bytes -= config.host_memory_bytes % config.host_chunk_bytes;
  return absl::OkStatus();
}

Config Defaults() {
  Config config;
  config.allow_uids = std::set<uint32_t>{geteuid()};
  config.allow_gids = std::set<uint32_t>{};
  return config;
}

std::string Help() {
  const Config defaults = Defaults();
  std::string help =
      "clusterkvd: keeps the KV cache of LLM workers in pinned host memory, clustered.\n\n"
      "Flags (environment CLUSTERKV_KEY, the same keys in the YAML of --config):\n";
  for (const Key& key : Keys()) {
    help += fmt::format("  --{:<28} {:<10} {} (default {})\n", key.name, key.type, key.help,
                        key.get(defaults).empty() ? "none" : key.get(defaults));
  }
  help += fmt::format("  --{:<28} {:<10} YAML file\n  --help, --version\n", "config", "path");
  return help;
}

}  // namespace

std::string Config::attach_socket_path() const {
  if (!attach_path.empty()) return attach_path;
  return listen.substr(sizeof(kUnixPrefix) - 1) + ".attach";
}

absl::StatusOr<Config> LoadConfig(int argc, const char* const* argv,
                                  const char* const* environment) {
  CKV_ASSIGN_OR_RETURN(Flags flags, ReadFlags(argc, argv));
  Config config = Defaults();
  if (flags.help) {
    config.early_output = Help();
    return config;
  }
  if (flags.version) {
    config.early_output = fmt::format("clusterkvd {}\n", kVersion);
    return config;
  }
  CKV_ASSIGN_OR_RETURN(const Values variables, ReadEnvironment(environment, flags.config_file));
  if (flags.config_file) {
    CKV_ASSIGN_OR_RETURN(const Values file, ReadFile(*flags.config_file));
    for (const auto& [name, value] : file) {
      CKV_RETURN_IF_ERROR(Set(config, name, value, *flags.config_file));
    }
  }
  for (const auto& [name, value] : variables) {
    CKV_RETURN_IF_ERROR(Set(config, name, value, "environment"));
  }
  for (const auto& [name, value] : flags.values) {
    CKV_RETURN_IF_ERROR(Set(config, name, value, "flag"));
  }
  CKV_RETURN_IF_ERROR(Finish(config));
  return config;
}

std::vector<std::pair<std::string, std::string>> EffectiveConfig(const Config& config) {
  std::vector<std::pair<std::string, std::string>> values;
  for (const Key& key : Keys()) values.emplace_back(key.name, key.get(config));
  return values;
}

}  // namespace clusterkv::service
