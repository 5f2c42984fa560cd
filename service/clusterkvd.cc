// clusterkvd: configuration, construction, signals, and the one list of the order of shutdown.
#include <fmt/format.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "gpu/device.h"
#include "gpu/numa_nodes.h"
#include "gpu/status_macros.h"
#include "service/admin_server.h"
#include "service/attach_server.h"
#include "service/config.h"
#include "service/core.h"
#include "service/device_plugin/device_plugin.h"
#include "service/host_pool.h"
#include "service/logging.h"
#include "service/numa_policy.h"
#include "service/rpc/fetch_server.h"
#include "service/rpc/grant_servers.h"
#include "service/rpc/grpc_server.h"
#include "service/rpc/rpc_counters.h"
#include "service/service_manager.h"
#include "service/version.h"

namespace clusterkv::service {
namespace {

constexpr int kExitUsage = 2;
constexpr int kExitUnavailable = 3;
constexpr int kExitExhausted = 4;

constexpr auto kSequencesTimeout = std::chrono::milliseconds(250);
constexpr absl::Duration kTickInterval = absl::Seconds(1);

int ExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
      return kExitUsage;
    case absl::StatusCode::kResourceExhausted:
      return kExitExhausted;
    default:
      return kExitUnavailable;
  }
}

// Never 0, so that a client that sends none is told.
uint64_t NewBootEpoch() {
  uint64_t epoch = 0;
  while (epoch == 0) {
    if (getrandom(&epoch, sizeof(epoch), 0) != sizeof(epoch)) std::abort();
  }
  return epoch;
}

// Blocked in all threads, taken by Wait: no handler runs anywhere.
class Signals {
 public:
  Signals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGTERM);
    sigaddset(&set_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    std::signal(SIGPIPE, SIG_IGN);
  }
  // True if a signal to stop came in time.
  bool Wait(absl::Duration timeout) const {
    const timespec limit = absl::ToTimespec(timeout);
    return sigtimedwait(&set_, nullptr, &limit) > 0;
  }

 private:
  sigset_t set_;
};

// To systemd, if it asked.
void Tell(const std::string& state) {
  const absl::Status told = NotifyServiceManager(std::getenv("NOTIFY_SOCKET"), state);
  if (!told.ok()) LogWarning("cannot tell systemd", {{"why", std::string(told.message())}});
}

// Sockets, memory of sessions and their processes are descriptors: the usual soft limit of 1,024 is
// for programs that use select.
void AllowAllDescriptors() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

// Until no session is left, the timeout, or a second signal. What is left goes on as before, and
// its housekeeping with it.
void Drain(ServiceCore& core, absl::Duration timeout, const Signals& signals,
           const std::function<void()>& tick) {
  auto idle = std::make_shared<std::promise<void>>();
  auto done = idle->get_future();
  core.Drain(timeout, [idle] { idle->set_value(); });
  const absl::Time deadline = absl::Now() + timeout;
  absl::Time next_tick = absl::Now();
  while (absl::Now() < deadline && !signals.Wait(absl::Milliseconds(50))) {
    if (done.wait_for(std::chrono::seconds(0)) == std::future_status::ready) return;
    if (absl::Now() < next_tick) continue;
    tick();
    next_tick = absl::Now() + kTickInterval;
  }
  LogWarning("ending the sessions that are left");
}

AttachOptions AttachOptionsOf(const Config& config) {
  return {.path = config.attach_socket_path(),
          .allow_any = !config.allow_uids || !config.allow_gids,
          .allow_uids = config.allow_uids.value_or(std::set<uint32_t>{}),
          .allow_gids = config.allow_gids.value_or(std::set<uint32_t>{}),
          .hello_timeout = config.attach_timeout};
}

absl::StatusOr<std::unique_ptr<DevicePlugin>> CreateDevicePlugin(const Config& config,
                                                                 ServiceCore& core,
                                                                 AttachServer& attach,
                                                                 RpcCounters& calls) {
  if (!config.device_plugin) return nullptr;
  const auto devices = static_cast<uint32_t>(config.offered_bytes() / kDeviceBytes);
  return DevicePlugin::Create({.directory = config.device_plugin_dir,
                               .grants = {.directory = config.grants_dir,
                                          .devices = devices,
                                          .device_bytes = kDeviceBytes}},
                              core, std::make_unique<GrantServers>(core, attach, calls));
}

// All of them, for the admin port. The core answers within microseconds unless it is overloaded.
absl::StatusOr<std::vector<SequenceStatus>> Sequences(ServiceCore& core) {
  using List = absl::StatusOr<std::vector<SequenceStatus>>;
  auto promise = std::make_shared<std::promise<List>>();
  auto list = promise->get_future();
  core.ListSequences(std::nullopt, [promise](List found) { promise->set_value(std::move(found)); });
  if (list.wait_for(kSequencesTimeout) == std::future_status::ready) return list.get();
  return absl::UnavailableError("the daemon's queue of requests is long; try again");
}

std::optional<int> PoolNode(const Config& config, const gpu::Device& device) {
  const std::optional<int> node = HostPoolNode(config, device.numa_node(), gpu::MemoryNodes());
  if (config.host_numa != NumaPlacement::kAuto || !node || !HasMemoryPolicy()) return node;
  LogInfo("the memory policy of this process is kept; a number as host-numa-node overrides it",
          {{"next_to_the_device", *node}});
  return std::nullopt;
}

absl::Status Serve(const Config& config, const Signals& signals) {
  CKV_ASSIGN_OR_RETURN(
      auto device,
      gpu::CreateDevice({.backend = config.backend,
                         .device = config.devices.empty() ? "" : config.devices.front(),
                         .threads = config.threads,
                         .gpu_sharing = config.gpu_sharing}));
  LogInfo("device", {{"backend", device->backend()}, {"description", device->description()}});
  CKV_ASSIGN_OR_RETURN(auto pool, HostPool::Create({.directory = config.host_memory_dir,
                                                    .total_bytes = config.host_memory_bytes,
                                                    .chunk_bytes = config.host_chunk_bytes,
                                                    .new_files = config.has_many_parties(),
                                                    .numa_node = PoolNode(config, *device),
                                                    .device = device.get()}));
  RpcCounters calls;  // of all servers
  CKV_ASSIGN_OR_RETURN(
      auto core, ServiceCore::Create({.version = kVersion,
                                      .boot_epoch = NewBootEpoch(),
                                      .gpu_memory_bytes = config.gpu_memory_bytes,
                                      .offered_bytes = config.offered_bytes(),
                                      .max_sessions = config.max_sessions,
                                      .max_sequences_per_session = config.max_sequences_per_session,
                                      .max_arenas_per_session = config.max_arenas_per_session,
                                      .attach_timeout = config.attach_timeout,
                                      .poll = config.poll_duration(),
                                      .audit_share = config.audit_share,
                                      .slow_operation = config.slow_operation},
                                     std::move(device), std::move(pool)));
  CKV_ASSIGN_OR_RETURN(auto grpc, GrpcServer::Create({.listen = config.listen,
                                                      .attach_path = config.attach_socket_path()},
                                                     *core, calls));
  CKV_ASSIGN_OR_RETURN(auto fetches,
                       FetchServer::Create({.poll = config.poll_duration()}, *core, calls));
  CKV_ASSIGN_OR_RETURN(auto attach, AttachServer::Create(AttachOptionsOf(config), *core, *fetches));
  CKV_ASSIGN_OR_RETURN(auto plugin, CreateDevicePlugin(config, *core, *attach, calls));
  const auto status = [&] {
    DaemonStatus taken = core->status();
    taken.rpcs = calls.status();
    taken.device_plugin_registered = plugin != nullptr && plugin->registered();
    return taken;
  };
  CKV_ASSIGN_OR_RETURN(
      auto admin,
      AdminServer::Create({.listen = config.admin_listen, .status = status, .sequences = [&core] {
                             return Sequences(*core);
                           }}));
  const auto tick = [&] {
    core->Tick();
    if (plugin != nullptr) plugin->Tick();
    admin->Sample();
  };
  grpc->SetServing(true);
  fmt::print("READY grpc={} admin={}\n", grpc->address(), admin->address());
  std::fflush(stdout);
  Tell("READY=1");

  // The kubelet hears of us at once.
  do {
    tick();
    grpc->SetServing(core->status().ready);
  } while (!signals.Wait(kTickInterval));

  // The order of shutdown.
  LogInfo("draining", {{"timeout", absl::FormatDuration(config.drain_timeout)}});
  grpc->SetServing(false);
  Tell("STOPPING=1");
  Drain(*core, config.drain_timeout, signals, tick);
  core->EndAllSessions();
  if (plugin != nullptr) plugin->Shutdown(absl::Seconds(2));
  grpc->Shutdown(absl::Seconds(2));
  core->Stop();
  attach.reset();
  fetches.reset();
  admin.reset();  // before the plugin, which it asks
  plugin.reset();
  LogInfo("stopped");
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  auto config = LoadConfig(argc, argv, environ);
  if (!config.ok()) {
    fmt::print(stderr, "clusterkvd: {}\n", std::string(config.status().message()));
    return ExitCode(config.status());
  }
  if (!config->early_output.empty()) {
    fmt::print("{}", config->early_output);
    return 0;
  }
  const Signals signals;
  AllowAllDescriptors();
  InitLogging(config->log_format, config->log_level);
  for (const auto& [key, value] : EffectiveConfig(*config)) {
    LogInfo("config", {{"key", key}, {"value", value}});
  }
  if (config->admin_is_remote()) {
    LogWarning("whoever reaches the admin port may read health, metrics and status",
               {{"admin-listen", config->admin_listen}});
  }
  const absl::Status served = Serve(*config, signals);
  if (!served.ok()) {
    LogError("clusterkvd cannot serve", {{"why", std::string(served.message())},
                                         {"code", absl::StatusCodeToString(served.code())}});
  }
  return ExitCode(served);
}

}  // namespace
}  // namespace clusterkv::service

int main(int argc, char** argv) { return clusterkv::service::Main(argc, argv); }
