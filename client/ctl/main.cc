// clusterkvctl: asks a daemon how it is. Needs no session.
// Exit codes: 0 ok, 1 the daemon answered with an error, 2 usage, 3 unavailable, 4 resource
// exhausted.
#include <CLI/CLI.hpp>
#include <chrono>
#include <iostream>
#include <string>

#include "absl/status/statusor.h"
#include "client/address.h"
#include "client/connection.h"
#include "client/ctl/report.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::ctl {
namespace {

struct Options {
  std::string address = DefaultAddress();
  std::string format = "table";
  double timeout_seconds = 5;
  uint32_t ping_count = 10;
  bool json() const { return format == "json"; }
  Deadline deadline() const { return Deadline(absl::Seconds(timeout_seconds)); }
};

int ExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
      return 2;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return 3;
    case absl::StatusCode::kResourceExhausted:
      return 4;
    default:
      return 1;
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

absl::StatusOr<std::string> Run(const std::string& command, const Options& options) {
  CKV_ASSIGN_OR_RETURN(const auto connection, Connection::Create(options.address));
  if (command == "ping") return Ping(*connection, options);
  if (command == "sequences") {
    CKV_ASSIGN_OR_RETURN(const v1::ListSequencesReply list,
                         connection->ListSequences({}, options.deadline()));
    return options.json() ? SequencesJson(list) : SequencesTable(list);
  }
  CKV_ASSIGN_OR_RETURN(const v1::GetStatusReply status,
                       connection->GetStatus({}, options.deadline()));
  if (command == "sessions") return options.json() ? SessionsJson(status) : SessionsTable(status);
  return options.json() ? StatusJson(status) : StatusTable(status);
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("Asks a clusterkvd how it is.", "clusterkvctl");
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
  for (CLI::App* const command : app.get_subcommands({})) command->fallthrough();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  const absl::StatusOr<std::string> text = Run(app.get_subcommands().front()->get_name(), options);
  if (text.ok()) {
    std::cout << *text << std::flush;
  } else {
    std::cerr << "clusterkvctl: " << text.status() << "\n";
  }
  return ExitCode(text.status());
}

}  // namespace
}  // namespace clusterkv::client::ctl

int main(int argc, char** argv) { return clusterkv::client::ctl::Main(argc, argv); }
