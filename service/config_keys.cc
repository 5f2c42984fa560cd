#include "service/config_keys.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "gpu/numa_nodes.h"
#include "gpu/status_macros.h"
#include "service/size_text.h"

namespace clusterkv::service {
namespace {

constexpr size_t kFarthestTypingError = 3;  // in edits
constexpr absl::Duration kLongestPoll = absl::Milliseconds(10);

ConfigKey TextKey(std::string name, std::string type, std::string help,
                  std::string Config::*field) {
  return {std::move(name), std::move(type), std::move(help),
          [field](Config& config, const std::string& text) {
            config.*field = text;
            return absl::OkStatus();
          },
          [field](const Config& config) { return config.*field; }};
}

ConfigKey ChoiceKey(std::string name, const std::vector<std::string>& choices, std::string help,
                    const std::function<void(Config&, size_t)>& set,
                    const std::function<size_t(const Config&)>& get) {
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

ConfigKey SizeKey(std::string name, std::string help, uint64_t Config::*field,
                  const std::string& zero) {
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
ConfigKey CountKey(std::string name, std::string help, T Config::*field, T low, T high) {
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

ConfigKey SwitchKey(std::string name, std::string help, bool Config::*field) {
  return {std::move(name),
          "true|false",
          std::move(help),
          [field](Config& config, const std::string& text) -> absl::Status {
            if (text != "true" && text != "false") {
              return absl::InvalidArgumentError(fmt::format("'{}' is not true or false", text));
            }
            config.*field = text == "true";
            return absl::OkStatus();
          },
          [field](const Config& config) { return config.*field ? "true" : "false"; },
          "true"};
}

ConfigKey ShareKey(std::string name, std::string help, double Config::*field) {
  return {
      std::move(name), "0..1", std::move(help),
      [field](Config& config, const std::string& text) -> absl::Status {
        double value = 0;
        if (!absl::SimpleAtod(text, &value) || !(value >= 0 && value <= 1)) {
          return absl::InvalidArgumentError(fmt::format("'{}' is not a number from 0 to 1", text));
        }
        config.*field = value;
        return absl::OkStatus();
      },
      [field](const Config& config) { return fmt::format("{}", config.*field); }};
}

ConfigKey DurationKey(std::string name, std::string help, absl::Duration Config::*field) {
  return {std::move(name), "duration", std::move(help),
          [field](Config& config, const std::string& text) -> absl::Status {
            CKV_ASSIGN_OR_RETURN(config.*field, ParseDuration(text));
            return absl::OkStatus();
          },
          [field](const Config& config) { return absl::FormatDuration(config.*field); }};
}

ConfigKey IdsKey(std::string name, std::string help,
                 std::optional<std::set<uint32_t>> Config::*field) {
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

std::vector<ConfigKey> AddressKeys() {
  return {
      TextKey("listen", "address", "gRPC: unix:PATH (made with mode 0660), or a loopback HOST:PORT",
              &Config::listen),
      TextKey(
          "attach-path", "path",
          "attach socket; by default the UNIX socket's path with .attach; needed with HOST:PORT",
          &Config::attach_path),
      TextKey("admin-listen", "address",
              "health, metrics and status over HTTP: a loopback HOST:PORT; port 0 picks one",
              &Config::admin_listen),
      SwitchKey("admin-allow-remote",
                "admin-listen may be any address, in numbers: for kubelet's probes and Prometheus",
                &Config::admin_allow_remote),
  };
}

ConfigKey NumaKey() {
  return {
      "host-numa-node", "auto|off|number",
      "NUMA node that host-memory is taken from while it has room; auto: the one next to the GPU",
      [](Config& config, const std::string& text) -> absl::Status {
        if (text == "auto" || text == "off") {
          config.host_numa = text == "auto" ? NumaPlacement::kAuto : NumaPlacement::kOff;
          return absl::OkStatus();
        }
        const std::set<int> nodes = gpu::MemoryNodes();
        if (!absl::SimpleAtoi(text, &config.host_numa_node) ||
            !nodes.contains(config.host_numa_node)) {
          return absl::InvalidArgumentError(
              fmt::format("'{}' is not auto, off or a node with memory, which are: {}", text,
                          nodes.empty() ? "none" : absl::StrJoin(nodes, ", ")));
        }
        config.host_numa = NumaPlacement::kNode;
        return absl::OkStatus();
      },
      [](const Config& config) -> std::string {
        switch (config.host_numa) {
          case NumaPlacement::kAuto:
            return "auto";
          case NumaPlacement::kOff:
            return "off";
          case NumaPlacement::kNode:
            break;
        }
        return std::to_string(config.host_numa_node);
      }};
}

ConfigKey DevicesKey() {
  return {"devices", "index|UUID,...", "the GPU of backend cuda, one for now; empty: the first",
          [](Config& config, const std::string& text) -> absl::Status {
            config.devices.clear();
            if (text.empty()) return absl::OkStatus();
            std::vector<std::string> devices = absl::StrSplit(text, ',');
            for (std::string& device : devices) {
              absl::StripAsciiWhitespace(&device);
              if (device.empty()) {
                return absl::InvalidArgumentError(
                    fmt::format("'{}' has an empty entry; write 0 or GPU-...", text));
              }
            }
            if (devices.size() > 1) {
              return absl::InvalidArgumentError(
                  fmt::format("'{}' names {} GPUs, and a daemon serves one for now: start one for "
                              "each, with listen, admin-listen and host-memory-dir of its own",
                              text, devices.size()));
            }
            config.devices = std::move(devices);
            return absl::OkStatus();
          },
          [](const Config& config) { return absl::StrJoin(config.devices, ","); }};
}

std::vector<ConfigKey> MemoryKeys() {
  static const std::vector<std::string> backends{"auto", "host", "cuda"};
  return {
      SizeKey("host-memory",
              "pinned host memory for KV, taken in full at start; rounded down to whole chunks",
              &Config::host_memory_bytes, ""),
      TextKey("host-memory-dir", "path", "its directory, on tmpfs or hugetlbfs; set to 0700",
              &Config::host_memory_dir),
      SizeKey("host-chunk",
              "piece of it that is lent whole to one session; auto: the power of two at or below "
              "host-memory / 32, 16mb to 1gb",
              &Config::host_chunk_bytes, "auto"),
      NumaKey(),
      ChoiceKey(
          "backend", backends, "where device work runs; auto: cuda if it is there",
          [](Config& config, size_t i) { config.backend = backends[i]; },
          [](const Config& config) {
            return static_cast<size_t>(std::ranges::find(backends, config.backend) -
                                       backends.begin());
          }),
      SizeKey("gpu-memory", "bound on device memory; 0: none", &Config::gpu_memory_bytes, "0"),
      DevicesKey(),
      ChoiceKey(
          "gpu-sharing", {"vmm", "legacy"},
          "how workers get device memory of backend cuda; legacy: for drivers that cannot pass it "
          "as a descriptor; not between two containers that are each pid 1",
          [](Config& config, size_t i) { config.gpu_sharing = static_cast<gpu::GpuSharing>(i); },
          [](const Config& config) { return static_cast<size_t>(config.gpu_sharing); }),
      CountKey<int>("threads", "of the host backend; 0: all cores", &Config::threads, 0, 1024),
  };
}

ConfigKey PollKey() {
  return {"poll-time", "duration|auto",
          "how long the threads that answer calls look for the next one before they sleep, at most "
          "10ms: takes up to two cores while calls come, and tens of microseconds off each; auto: "
          "1ms on 8 cores or more, else 0s",
          [](Config& config, const std::string& text) -> absl::Status {
            config.poll_time.reset();
            if (text == "auto") return absl::OkStatus();
            CKV_ASSIGN_OR_RETURN(const absl::Duration time, ParseDuration(text));
            if (time > kLongestPoll) {
              return absl::InvalidArgumentError(fmt::format("'{}' is more than 10ms", text));
            }
            config.poll_time = time;
            return absl::OkStatus();
          },
          [](const Config& config) {
            return config.poll_time ? absl::FormatDuration(*config.poll_time) : "auto";
          }};
}

std::vector<ConfigKey> ClientKeys() {
  return {
      IdsKey("allow-uids", "uids that may attach", &Config::allow_uids),
      IdsKey("allow-gids", "gids that may attach; either list is enough", &Config::allow_gids),
      CountKey<uint32_t>("max-sessions",
                         "open at the same time, at the listen socket and at each container's",
                         &Config::max_sessions, 1, 65536),
      CountKey<uint32_t>("max-sequences-per-session", "registered at the same time",
                         &Config::max_sequences_per_session, 1, 1u << 20),
      CountKey<uint32_t>("max-arenas-per-session", "rings and buffers",
                         &Config::max_arenas_per_session, 1, 65536),
      ShareKey(
          "audit-share",
          "of one core, that audits of workers' steps against exact attention may take; 0: none",
          &Config::audit_share),
      DurationKey("drain-timeout", "after SIGTERM, before sessions are ended",
                  &Config::drain_timeout),
      DurationKey("attach-timeout", "for a new session to attach", &Config::attach_timeout),
      PollKey(),
  };
}

std::vector<ConfigKey> DevicePluginKeys() {
  return {
      SwitchKey("device-plugin",
                "offer host-memory to the kubelet as clusterkv.io/host-gib, one device a GiB; a "
                "container that asks for some gets sockets of its own, CLUSTERKV_ADDRESS, and that "
                "much; alone it is the same as true",
                &Config::device_plugin),
      SizeKey("device-plugin-memory",
              "of host-memory, in whole GiB, what is offered and kept for containers; the rest is "
              "for workers at the listen socket; auto: every whole GiB",
              &Config::device_plugin_memory_bytes, "auto"),
      TextKey("device-plugin-dir", "path",
              "the kubelet's directory of device plugin sockets, where kubelet.sock lies",
              &Config::device_plugin_dir),
      TextKey("grants-dir", "path",
              "folders that are mounted into containers, and which devices each has; must outlive "
              "a restart, and have the same path here as on the node; set to 0700",
              &Config::grants_dir),
  };
}

std::vector<ConfigKey> LogKeys() {
  return {
      ChoiceKey(
          "log-level", {"debug", "info", "warning", "error"}, "least severe that is logged",
          [](Config& config, size_t i) { config.log_level = static_cast<LogLevel>(i); },
          [](const Config& config) { return static_cast<size_t>(config.log_level); }),
      ChoiceKey(
          "log-format", {"text", "json"}, "of the log on stderr",
          [](Config& config, size_t i) { config.log_format = static_cast<LogFormat>(i); },
          [](const Config& config) { return static_cast<size_t>(config.log_format); }),
      DurationKey("slow-operation",
                  "from here on an operation is logged as slow, with its phases; 0: none",
                  &Config::slow_operation),
  };
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

}  // namespace

const std::vector<ConfigKey>& ConfigKeys() {
  static const std::vector<ConfigKey> keys = [] {
    std::vector<ConfigKey> all;
    for (auto* const group :
         {&AddressKeys, &MemoryKeys, &ClientKeys, &DevicePluginKeys, &LogKeys}) {
      for (ConfigKey& key : (*group)()) all.push_back(std::move(key));
    }
    return all;
  }();
  return keys;
}

absl::StatusOr<const ConfigKey*> FindConfigKey(const std::string& name,
                                               const std::string& written) {
  const ConfigKey* nearest = nullptr;
  size_t best = kFarthestTypingError + 1;
  std::vector<std::string> names;
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.name == name) return &key;
    const size_t distance = EditDistance(key.name, name);
    if (distance < best) {
      best = distance;
      nearest = &key;
    }
    names.push_back(key.name);
  }
  return absl::InvalidArgumentError(fmt::format(
      "unknown key '{}'{} Known are {}", written,
      nearest != nullptr ? fmt::format("; did you mean '{}'?", nearest->name) : std::string("."),
      absl::StrJoin(names, ", ")));
}

}  // namespace clusterkv::service
