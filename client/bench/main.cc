// clusterkv-bench: the machine's ceilings, then each operation against its floor.
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "client/bench/backend.h"
#include "client/bench/bench_run.h"
#include "client/bench/options.h"
#include "client/bench/report.h"
#include "client/replay/interrupt.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

// The contract's exit codes.
enum ExitCode { kOk = 0, kFailed = 1, kUsage = 2, kUnavailable = 3, kExhausted = 4 };

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kOk;
    case absl::StatusCode::kInvalidArgument:
      return kUsage;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return kUnavailable;
    case absl::StatusCode::kResourceExhausted:
      return kExhausted;
    default:
      return kFailed;
  }
}

int Fail(int exit_code, const absl::Status& status) {
  std::fprintf(stderr, "clusterkv-bench: %s\n", std::string(status.message()).c_str());
  return exit_code;
}

absl::Status Measure(const BenchRun& run) {
  const struct {
    const char* what;
    absl::Status (*measure)(const BenchRun&);
  } measurements[] = {{"ceilings", MeasureCeilings},
                      {"gather", MeasureGather},
                      {"kmeans", MeasureKmeans},
                      {"permute-offload", MeasurePermute},
                      {"layers of a step", MeasureLayers},
                      {"decode", MeasureDecode},
                      {"served", MeasureServed}};
  for (const auto& [what, measure] : measurements) {
    CKV_RETURN_IF_ERROR(replay::CheckInterrupt());
    const absl::Status status = measure(run);
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat(what, ": ", std::string(status.message())));
    }
  }
  return absl::OkStatus();
}

absl::Status Run(const BenchOptions& options) {
  CKV_ASSIGN_OR_RETURN(const auto backend, CreateBackend(options.backend));
  Report report;
  report.backend = backend->device().backend();
  report.device = backend->device().description();
  report.driver = backend->driver();
  report.seed = options.seed;
  report.repeats = options.repeats;
  report.preset = options.preset;
  absl::Status measured = Measure({options, *backend, report});
  if (measured.code() == absl::StatusCode::kCancelled) return measured;
  // What was measured before an error is told all the same.
  const std::string text =
      options.format == Format::kJson ? ReportJson(report) : ReportText(report);
  if (std::fputs(text.c_str(), stdout) < 0 || std::fflush(stdout) != 0) {
    return absl::ErrnoToStatus(errno, "writing the report");
  }
  return measured;
}

int Main(int argc, char** argv) {
  const absl::StatusOr<std::optional<BenchOptions>> parsed = ParseOptions(argc, argv);
  if (!parsed.ok()) return Fail(kUsage, parsed.status());
  if (!parsed->has_value()) return kOk;
  replay::CatchInterrupts();
  std::signal(SIGPIPE, SIG_IGN);  // a closed stdout is an error to report, with the daemon stopped
  const absl::Status status = Run(**parsed);
  return status.ok() ? kOk : Fail(ExitCodeOf(status), status);
}

}  // namespace
}  // namespace clusterkv::client::bench

int main(int argc, char** argv) { return clusterkv::client::bench::Main(argc, argv); }
