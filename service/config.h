// The daemon's configuration: one table of keys gives flags (--host-memory), environment
// (CLUSTERKV_HOST_MEMORY), YAML (host-memory:), the help and the effective configuration.
// A flag goes before the environment, that before the file, that before the default.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gpu/device.h"
#include "service/logging.h"

namespace clusterkv::service {

// Of the host pool: next to the device, wherever the kernel puts it, or a node by its number.
enum class NumaPlacement { kAuto, kOff, kNode };

struct Config {
  std::string listen = "unix:/run/clusterkv/clusterkvd.sock";
  std::string attach_path;  // empty: the UNIX socket's path with .attach
  std::string admin_listen = "127.0.0.1:9464";
  bool admin_allow_remote = false;           // admin_listen may be more than loopback
  uint64_t host_memory_bytes = 2ull << 30;   // whole chunks
  uint64_t requested_host_memory_bytes = 0;  // before that rounding
  std::string host_memory_dir = "/dev/shm/clusterkv";
  uint64_t host_chunk_bytes = 0;  // 0: chosen from host_memory
  NumaPlacement host_numa = NumaPlacement::kAuto;
  int host_numa_node = 0;  // with kNode
  std::string backend = "auto";
  std::vector<std::string> devices;  // of cuda: indexes or UUIDs, at most one; empty: the first
  gpu::GpuSharing gpu_sharing = gpu::GpuSharing::kVmm;
  uint64_t gpu_memory_bytes = 0;                 // 0: no bound
  int threads = 0;                               // 0: all cores
  std::optional<std::set<uint32_t>> allow_uids;  // nullopt: any
  std::optional<std::set<uint32_t>> allow_gids;
  bool device_plugin = false;
  uint64_t device_plugin_memory_bytes = 0;  // 0: every whole GiB of host_memory
  std::string device_plugin_dir = "/var/lib/kubelet/device-plugins";
  std::string grants_dir = "/var/lib/clusterkv/grants";
  uint32_t max_sessions = 64;
  uint32_t max_sequences_per_session = 1024;
  uint32_t max_arenas_per_session = 64;
  absl::Duration drain_timeout = absl::Seconds(10);
  absl::Duration attach_timeout = absl::Seconds(10);
  double audit_share = 0.05;                // of a core
  std::optional<absl::Duration> poll_time;  // nullopt: auto
  LogLevel log_level = LogLevel::kInfo;
  LogFormat log_format = LogFormat::kText;
  absl::Duration slow_operation = absl::Seconds(1);  // 0: none is slow

  std::string early_output;  // of --help and --version: print it and exit

  std::string attach_socket_path() const;
  // Whether workers may come that do not belong to one user: with grants, or by the allow-lists.
  bool has_many_parties() const;
  absl::Duration poll_duration() const;  // auto: where there are cores to spare
  bool admin_is_remote() const;          // admin_listen is not loopback
  // Of host_memory, offered to the kubelet: whole GiB, 0 without the device plugin.
  uint64_t offered_bytes() const;
};

// A device of the device plugin.
constexpr uint64_t kDeviceBytes = 1ull << 30;

// `environment` is a null-terminated list of NAME=VALUE.
// Errors: INVALID_ARGUMENT that names the key, where it came from, and what is allowed.
absl::StatusOr<Config> LoadConfig(int argc, const char* const* argv,
                                  const char* const* environment);

// What host-chunk auto is. Containers (the device plugin's) have whole GiB, which several sessions
// may share, and so get smaller chunks.
enum class ChunkUsers { kSessions, kContainers };
uint64_t AutoHostChunk(uint64_t host_memory_bytes, ChunkUsers users);

// Every key with the value that is in force, and whether host-memory was rounded down.
std::vector<std::pair<std::string, std::string>> EffectiveConfig(const Config& config);

}  // namespace clusterkv::service
