// clusterkv-replay: reads a trace, evaluates the baselines, runs the service, reports.
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/replay/evaluation.h"
#include "client/replay/html_report.h"
#include "client/replay/interrupt.h"
#include "client/replay/options.h"
#include "client/replay/output_file.h"
#include "client/replay/private_daemon.h"
#include "client/replay/progress.h"
#include "client/replay/report.h"
#include "client/replay/worker.h"
#include "client/replay/worker_processes.h"
#include "gpu/device.h"
#include "gpu/host/thread_pool.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::replay {
namespace {

// The contract's exit codes.
enum ExitCode { kOk = 0, kFailed = 1, kUsage = 2, kUnavailable = 3, kExhausted = 4, kBadInput = 5 };

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
    case absl::StatusCode::kDataLoss:
      return kBadInput;
    default:
      return kFailed;
  }
}

int Fail(int exit_code, const absl::Status& status) {
  std::fprintf(stderr, "clusterkv-replay: %s\n", std::string(status.message()).c_str());
  return exit_code;
}

std::vector<Baseline> WantedBaselines(const ReplayOptions& options) {
  std::vector<Baseline> wanted;
  if (options.Has(Method::kQuest)) {
    wanted = {Baseline::kQuestSoftmax, Baseline::kQuestMean, Baseline::kQuestMax};
  }
  if (options.Has(Method::kWindow)) wanted.push_back(Baseline::kWindow);
  if (options.Has(Method::kOracle)) wanted.push_back(Baseline::kOracle);
  return wanted;
}

class Replay {
 public:
  Replay(const ReplayOptions& options, const Trace& trace, std::vector<std::string> arguments)
      : options_(options),
        trace_(trace),
        arguments_(std::move(arguments)),
        progress_(isatty(STDERR_FILENO) == 1) {}

  absl::Status Run() {
    std::unique_ptr<OutputFile> html;
    if (!options_.html.empty()) {
      CKV_ASSIGN_OR_RETURN(html, OutputFile::Create(options_.html));
    }
    const std::vector<StepRange> ranges =
        StepRanges(options_.method, trace_.prompt_tokens(), options_.steps);
    CKV_ASSIGN_OR_RETURN(const Evaluation evaluation, EvaluateSteps(ranges));
    std::vector<ServiceTotals> service;  // of the run, then of the sweep
    if (options_.Has(Method::kClusterkv)) {
      CKV_ASSIGN_OR_RETURN(service, RunWithDaemon(evaluation.exact));
    }
    progress_.Finish();
    ReportSource source;
    source.options = &options_;
    source.trace = &trace_;
    source.ranges = &ranges;
    source.evaluation = &evaluation;
    if (!service.empty()) {
      source.service = &service.front();
      source.cache_sweep.assign(service.begin() + 1, service.end());
    }
    // The baselines alone run here, on the CPU, whatever the daemon would have used.
    source.backend = service.empty() ? "host" : service.front().backend;
    const auto device = gpu::CreateDevice({.backend = source.backend});
    source.device = device.ok() ? (*device)->description() : source.backend;
    const Report report = BuildReport(source);
    if (html != nullptr) CKV_RETURN_IF_ERROR(html->Commit(ReportHtml(report)));
    const std::string text =
        options_.format == Format::kJson ? ReportJson(report) : ReportTable(report);
    if (std::fputs(text.c_str(), stdout) < 0 || std::fflush(stdout) != 0) {
      return absl::ErrnoToStatus(errno, "writing the report");
    }
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<Evaluation> EvaluateSteps(const std::vector<StepRange>& ranges) {
    EvaluationRequest request;
    request.trace = &trace_;
    request.ranges = ranges;
    request.budgets = RisingBudgets(options_);
    request.baselines = WantedBaselines(options_);
    request.keep_exact = options_.Has(Method::kClusterkv) && options_.workers == 1;
    request.advance = [this](uint64_t count) { progress_.Advance(count); };
    progress_.Begin("exact attention and baselines",
                    uint64_t{options_.steps} * trace_.shape().problems());
    if (request.baselines.empty() && !request.keep_exact) return Evaluation();
    gpu::host::ThreadPool threads(CoresOfThisProcess());
    return Evaluate(request, threads);
  }

  absl::StatusOr<std::vector<ServiceTotals>> RunWithDaemon(const ExactTable& exact) {
    progress_.Begin("clusterkv",
                    WorkerSteps(options_) * options_.workers * (1 + options_.cache_sweep.size()));
    if (!options_.connect.empty()) return RunSizes(options_, exact);
    PrivateDaemonOptions daemon_options;
    daemon_options.backend = options_.backend;
    daemon_options.memory =
        HostMemoryFor(trace_, options_.method, options_.workers, options_.sequences);
    CKV_ASSIGN_OR_RETURN(const std::unique_ptr<PrivateDaemon> daemon,
                         PrivateDaemon::Start(daemon_options));
    ReplayOptions connected = options_;
    connected.connect = daemon->address();
    absl::StatusOr<std::vector<ServiceTotals>> totals = RunSizes(connected, exact);
    const absl::Status stopped = daemon->Stop();
    if (totals.ok() && !stopped.ok()) return stopped;
    return totals;
  }

  // With the run's size of the cache, then with each of the sweep's.
  absl::StatusOr<std::vector<ServiceTotals>> RunSizes(const ReplayOptions& connected,
                                                      const ExactTable& exact) {
    std::vector<ServiceTotals> runs;
    CKV_ASSIGN_OR_RETURN(runs.emplace_back(), RunWorkers(connected, exact));
    ReplayOptions sized = connected;
    sized.dump_outputs.clear();
    for (const uint32_t size : options_.cache_sweep) {
      sized.method.cache_tokens = size;
      CKV_ASSIGN_OR_RETURN(runs.emplace_back(), RunWorkers(sized, exact));
    }
    return runs;
  }

  absl::StatusOr<ServiceTotals> RunWorkers(const ReplayOptions& options, const ExactTable& exact) {
    if (options.workers > 1) return RunWorkerProcesses(options, trace_, arguments_, progress_);
    gpu::host::ThreadPool threads(CoresOfThisProcess());
    return RunWorker(options, trace_, exact, threads, progress_);
  }

  const ReplayOptions& options_;
  const Trace& trace_;
  const std::vector<std::string> arguments_;
  Progress progress_;
};

int Main(int argc, char** argv) {
  absl::StatusOr<std::optional<ReplayOptions>> parsed = ParseOptions(argc, argv);
  if (!parsed.ok()) return Fail(kUsage, parsed.status());
  if (!parsed->has_value()) return kOk;
  ReplayOptions& options = **parsed;
  const absl::StatusOr<Trace> trace = Trace::Open(options.trace);
  if (!trace.ok()) return Fail(kBadInput, trace.status());
  if (const absl::Status status = CheckAgainstTrace(*trace, options); !status.ok()) {
    return Fail(kUsage, status);
  }
  CatchInterrupts();
  std::signal(SIGPIPE, SIG_IGN);  // a closed stdout is an error to report, with the daemon stopped
  if (options.worker_index.has_value()) {
    const absl::Status status = RunAsWorkerProcess(options, *trace);
    return status.ok() ? kOk : Fail(kFailed, status);
  }
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  for (uint32_t i = 0; options.repeat == 0 || i < options.repeat; ++i) {
    const absl::Status status = Replay(options, *trace, arguments).Run();
    if (status.ok()) continue;
    // Without an end of its own, being stopped is how it ends.
    const bool stopped = options.repeat == 0 && !CheckInterrupt().ok();
    return stopped ? kOk : Fail(ExitCodeOf(status), status);
  }
  return kOk;
}

}  // namespace
}  // namespace clusterkv::client::replay

int main(int argc, char** argv) { return clusterkv::client::replay::Main(argc, argv); }
