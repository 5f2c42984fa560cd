// clusterkvd: configuration, construction, signals, and the one list of the order of shutdown.
#include <fmt/format.h>
#include <sys/random.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "gpu/device.h"
#include "gpu/status_macros.h"
#include "service/admin_server.h"
#include "service/attach_server.h"
#include "service/config.h"
#include "service/core.h"
#include "service/host_pool.h"
#include "service/logging.h"
#include "service/rpc/grpc_server.h"
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

// All of them, for the admin port. The core answers within microseconds unless it is overloaded.
absl::StatusOr<std::vector<SequenceStatus>> Sequences(ServiceCore& core) {
  using List = absl::StatusOr<std::vector<SequenceStatus>>;
  auto promise = std::make_shared<std::promise<List>>();
  auto list = promise->get_future();
  core.ListSequences(std::nullopt, [promise](List found) { promise->set_value(std::move(found)); });
  if (list.wait_for(kSequencesTimeout) == std::future_status::ready) return list.get();
  return absl::UnavailableError("the daemon's queue of requests is long; try again");
}

absl::Status Serve(const Config& config, const Signals& signals) {
  CKV_ASSIGN_OR_RETURN(auto device, gpu::CreateDevice({.backend = config.backend,
                                                       .device = config.device,
                                                       .threads = config.threads}));
  LogInfo("device", {{"backend", device->backend()}, {"description", device->description()}});
  CKV_ASSIGN_OR_RETURN(auto pool, HostPool::Create({.directory = config.host_memory_dir,
                                                    .total_bytes = config.host_memory_bytes,
                                                    .chunk_bytes = config.host_chunk_bytes,
                                                    .device = device.get()}));
  CKV_ASSIGN_OR_RETURN(
      auto core, ServiceCore::Create({.version = kVersion,
                                      .boot_epoch = NewBootEpoch(),
                                      .gpu_memory_bytes = config.gpu_memory_bytes,
                                      .max_sessions = config.max_sessions,
                                      .max_sequences_per_session = config.max_sequences_per_session,
                                      .max_arenas_per_session = config.max_arenas_per_session,
                                      .attach_timeout = config.attach_timeout,
                                      .slow_operation = config.slow_operation},
                                     std::move(device), std::move(pool)));
  CKV_ASSIGN_OR_RETURN(auto grpc,
                       GrpcServer::Create(config.listen, config.attach_socket_path(), *core));
  CKV_ASSIGN_OR_RETURN(
      auto attach,
      AttachServer::Create({.path = config.attach_socket_path(),
                            .allow_any = !config.allow_uids || !config.allow_gids,
                            .allow_uids = config.allow_uids.value_or(std::set<uint32_t>{}),
                            .allow_gids = config.allow_gids.value_or(std::set<uint32_t>{}),
                            .hello_timeout = config.attach_timeout},
                           *core));
  CKV_ASSIGN_OR_RETURN(auto admin,
                       AdminServer::Create({.listen = config.admin_listen,
                                            .status = [&core] { return core->status(); },
                                            .sequences = [&core] { return Sequences(*core); }}));
  grpc->SetServing(true);
  fmt::print("READY grpc={} admin={}\n", grpc->address(), admin->address());
  std::fflush(stdout);

  const auto tick = [&] {
    core->Tick();
    admin->Sample();
  };
  while (!signals.Wait(kTickInterval)) {
    tick();
    grpc->SetServing(core->status().ready);
  }

  // The order of shutdown.
  LogInfo("draining", {{"timeout", absl::FormatDuration(config.drain_timeout)}});
  grpc->SetServing(false);
  Drain(*core, config.drain_timeout, signals, tick);
  core->EndAllSessions();
  grpc->Shutdown(absl::Seconds(2));
  core->Stop();
  attach.reset();
  admin.reset();
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
  InitLogging(config->log_format, config->log_level);
  for (const auto& [key, value] : EffectiveConfig(*config)) {
    LogInfo("config", {{"key", key}, {"value", value}});
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
