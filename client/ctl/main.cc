// clusterkvctl: asks a daemon how it is, and a machine whether it is fit for one. Needs no session.
// Exit codes: 0 ok, 1 a check failed or the daemon answered with an error, 2 usage, 3 unavailable,
// 4 resource exhausted.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

#include "absl/status/statusor.h"
#include "client/address.h"
#include "client/connection.h"
#include "client/ctl/doctor/doctor.h"
#include "client/ctl/report.h"
#include "client/ctl/styled_line.h"
#include "client/ctl/top/top.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::ctl {
namespace {

constexpr int kCheckFailed = 1;
constexpr int kUsage = 2;

struct Options {
  std::string address = DefaultAddress();
  std::string format = "table";
  double timeout_seconds = 5;
  uint32_t ping_count = 10;
  double interval_seconds = 2;
  uint32_t iterations = 0;
  std::string host_memory_dir = "/dev/shm/clusterkv";
  uint64_t host_memory_bytes = 0;
  bool preflight = false;
  bool json() const { return format == "json"; }
  absl::Duration timeout() const { return absl::Seconds(timeout_seconds); }
  Deadline deadline() const { return Deadline(timeout()); }
};

int ExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
      return kUsage;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return 3;
    case absl::StatusCode::kResourceExhausted:
      return 4;
    default:
      return kCheckFailed;
  }
}

absl::StatusOr<std::string> Ping(Connection& connection, const Options& options) {
  PingTimes times{.address = options.address, .microseconds = {}};
  // The first call opens the connection; it is not one of the round trips.
  CKV_RETURN_IF_ERROR(connection.GetStatus({}, options.deadline()).status());
  for (uint32_t i = 0; i < options.ping_count; ++i) {
    const auto start = std::chrono::steady_clock::now();
    CKV_RETURN_IF_ERROR(connection.GetStatus({}, options.deadline()).status());
    times.microseconds.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
            .count());
  }
  return options.json() ? PingJson(times) : PingTable(times);
}

absl::StatusOr<std::string> Ask(const std::string& command, const Options& options) {
  CKV_ASSIGN_OR_RETURN(const auto connection, Connection::Create(options.address));
  if (command == "ping") return Ping(*connection, options);
  if (command == "sequences") {
    CKV_ASSIGN_OR_RETURN(const v1::ListSequencesReply list,
                         connection->ListSequences({}, options.deadline()));
    return options.json() ? SequencesJson(list) : SequencesTable(list);
  }
  v1::GetStatusRequest request;
  request.set_want_recent_errors(command == "status");
  CKV_ASSIGN_OR_RETURN(const v1::GetStatusReply status,
                       connection->GetStatus(request, options.deadline()));
  if (command == "sessions") return options.json() ? SessionsJson(status) : SessionsTable(status);
  return options.json() ? StatusJson(status) : StatusTable(status);
}

absl::Status Top(const Options& options) {
  CKV_ASSIGN_OR_RETURN(const auto connection, Connection::Create(options.address));
  return RunTop(*connection, {.interval = absl::Seconds(options.interval_seconds),
                              .timeout = options.timeout(),
                              .iterations = options.iterations,
                              .json = options.json()});
}

int Doctor(const Options& options) {
  const char* const mps = std::getenv("CUDA_MPS_PIPE_DIRECTORY");
  const std::vector<Check> checks = RunDoctor(Machine(), ProbeDriver(),
                                              {.address = options.address,
                                               .timeout = options.timeout(),
                                               .host_memory_dir = options.host_memory_dir,
                                               .host_memory_bytes = options.host_memory_bytes,
                                               .preflight = options.preflight,
                                               .version = CLUSTERKV_VERSION,
                                               .mps_pipe_directory = mps == nullptr ? "" : mps});
  std::cout << (options.json() ? DoctorJson(checks) : DoctorTable(checks, StdoutWantsColour()))
            << std::flush;
  return AnyFailed(checks) ? kCheckFailed : 0;
}

int Run(const std::string& command, const Options& options) {
  if (command == "doctor") return Doctor(options);
  absl::StatusOr<std::string> text = std::string();
  if (command == "top") {
    if (absl::Status status = Top(options); !status.ok()) text = status;
  } else {
    text = Ask(command, options);
  }
  if (text.ok()) {
    std::cout << *text << std::flush;
  } else {
    std::cerr << "clusterkvctl: " << text.status() << "\n";
  }
  return ExitCode(text.status());
}

void Declare(CLI::App& app, Options& options) {
  app.set_version_flag("--version", CLUSTERKV_VERSION);
  app.add_option("--address", options.address,
                 "unix:PATH or HOST:PORT of the daemon; by default $CLUSTERKV_ADDRESS")
      ->capture_default_str();
  app.add_option("--format", options.format, "what to print")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  app.add_option("--timeout", options.timeout_seconds, "seconds that a call may take")
      ->check(CLI::Range(0.001, 3600.0))
      ->capture_default_str();
  app.require_subcommand(1);
  CLI::App* const ping = app.add_subcommand("ping", "round-trip times");
  ping->add_option("-n,--count", options.ping_count, "round trips")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  app.add_subcommand("status", "version, readiness, memory");
  app.add_subcommand("sessions", "the workers that are connected");
  app.add_subcommand("sequences", "the sequences of all sessions");
  CLI::App* const top =
      app.add_subcommand("top", "rates, memory and sessions, live; q or Ctrl-C leaves");
  top->add_option("--interval", options.interval_seconds, "seconds from one look to the next")
      ->check(CLI::Range(0.05, 3600.0))
      ->capture_default_str();
  top->add_option("-n,--iterations", options.iterations, "how many looks; 0: until you leave")
      ->check(CLI::Range(0, 1'000'000'000))
      ->capture_default_str();
  CLI::App* const doctor =
      app.add_subcommand("doctor", "is this machine fit for the daemon, and what to do if not");
  doctor->add_option("--host-memory-dir", options.host_memory_dir, "as the daemon's")
      ->capture_default_str();
  doctor
      ->add_option("--host-memory", options.host_memory_bytes,
                   "of a daemon to be started, as 30gb: is there room?")
      ->transform(CLI::AsSizeValue(false));
  doctor->add_flag("--preflight", options.preflight, "no daemon runs yet: ask for none");
  for (CLI::App* const command : app.get_subcommands({})) command->fallthrough();
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("Asks a clusterkvd how it is, and a machine whether it is fit for one.",
               "clusterkvctl");
  try {
    Declare(app, options);
    app.parse(argc, argv);
  } catch (const CLI::Error& error) {
    return app.exit(error) == 0 ? 0 : kUsage;
  }
  return Run(app.get_subcommands().front()->get_name(), options);
}

}  // namespace
}  // namespace clusterkv::client::ctl

int main(int argc, char** argv) {
  try {
    return clusterkv::client::ctl::Main(argc, argv);
  } catch (const std::exception& error) {  // of CLI11, for options that we declared wrongly
    std::fprintf(stderr, "clusterkvctl: %s\n", error.what());
    return clusterkv::client::ctl::kCheckFailed;
  }
}
