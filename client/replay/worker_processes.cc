#include "client/replay/worker_processes.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/replay/child_process.h"
#include "client/replay/evaluation.h"
#include "client/replay/interrupt.h"
#include "client/replay/step_range.h"
#include "client/replay/worker.h"
#include "gpu/status_macros.h"
#include "gpu/unique_fd.h"
#include "nlohmann/json.hpp"

namespace clusterkv::client::replay {
namespace {

constexpr absl::Duration kExitTimeout = absl::Seconds(60);
constexpr uint64_t kStepsPerMessage = 16;

// The parent's view of one worker.
class Worker {
 public:
  static absl::StatusOr<Worker> Start(const ReplayOptions& options,
                                      const std::vector<std::string>& arguments, uint32_t index) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "pipe");
    gpu::UniqueFd read_end(ends[0]);
    gpu::UniqueFd write_end(ends[1]);
    ChildOptions child;
    child.arguments = {ProgramPath(), absl::StrCat("--worker-index=", index),
                       absl::StrCat("--result-fd=", write_end.get()),
                       absl::StrCat("--worker-address=", options.connect),
                       absl::StrCat("--worker-cache-tokens=", options.method.cache_tokens)};
    child.arguments.insert(child.arguments.end(), arguments.begin(), arguments.end());
    child.kept_fd = write_end.get();
    CKV_ASSIGN_OR_RETURN(ChildProcess process, ChildProcess::Start(child));
    return Worker(std::move(process), std::move(read_end));
  }

  int fd() const { return pipe_.get(); }

  // Takes what is in the pipe. False at its end.
  bool Read(Progress& progress) {
    char buffer[4096];
    const ssize_t bytes = read(pipe_.get(), buffer, sizeof(buffer));
    if (bytes < 0) return errno == EINTR || errno == EAGAIN;
    if (bytes == 0) {
      pipe_.Reset();
      return false;
    }
    text_.append(buffer, static_cast<size_t>(bytes));
    for (size_t end = text_.find('\n'); end != std::string::npos; end = text_.find('\n')) {
      TakeLine(text_.substr(0, end), progress);
      text_.erase(0, end + 1);
    }
    return true;
  }

  absl::StatusOr<ServiceTotals> Finish(size_t budgets, size_t layers) {
    CKV_ASSIGN_OR_RETURN(const ChildEnd end, process_.Wait(kExitTimeout));
    if (!error_.ok()) return error_;
    if (end.signal != 0 || end.exit_code != 0 || !result_.has_value()) {
      return absl::InternalError(absl::StrCat(end.Describe(), " before it had a result"));
    }
    return ServiceTotalsFromJson(*result_, budgets, layers);
  }

  void Interrupt() const { process_.Signal(SIGTERM); }

 private:
  Worker(ChildProcess process, gpu::UniqueFd pipe)
      : process_(std::move(process)), pipe_(std::move(pipe)) {}

  void TakeLine(const std::string& line, Progress& progress) {
    nlohmann::json message = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!message.is_object()) return;
    if (message.contains("steps")) progress.Advance(message["steps"].get<uint64_t>());
    if (message.contains("result")) result_ = std::move(message["result"]);
    if (message.contains("error")) {
      error_ = absl::Status(static_cast<absl::StatusCode>(message["error"]["code"].get<int>()),
                            message["error"]["message"].get<std::string>());
    }
  }

  ChildProcess process_;
  gpu::UniqueFd pipe_;
  std::string text_;  // not yet a line
  std::optional<nlohmann::json> result_;
  absl::Status error_;
};

void ReadAll(std::vector<Worker>& workers, Progress& progress) {
  bool interrupted = false;
  while (true) {
    std::vector<pollfd> open;
    std::vector<size_t> owners;
    for (size_t i = 0; i < workers.size(); ++i) {
      if (workers[i].fd() < 0) continue;
      open.push_back({.fd = workers[i].fd(), .events = POLLIN, .revents = 0});
      owners.push_back(i);
    }
    if (open.empty()) return;
    poll(open.data(), open.size(), /*timeout=*/200);
    if (!CheckInterrupt().ok() && !std::exchange(interrupted, true)) {
      for (const Worker& worker : workers) worker.Interrupt();
    }
    for (size_t i = 0; i < open.size(); ++i) {
      if (open[i].revents != 0) workers[owners[i]].Read(progress);
    }
  }
}

absl::Status WriteLine(int fd, const nlohmann::json& message) {
  const std::string line =
      message.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  for (size_t written = 0; written < line.size();) {
    const ssize_t bytes = write(fd, line.data() + written, line.size() - written);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes < 0) return absl::ErrnoToStatus(errno, "writing to the parent");
    written += static_cast<size_t>(bytes);
  }
  return absl::OkStatus();
}

absl::StatusOr<ServiceTotals> EvaluateAndRun(const ReplayOptions& options, const Trace& trace,
                                             Progress& progress) {
  gpu::host::ThreadPool threads(CoresOfThisProcess());
  EvaluationRequest request;
  request.trace = &trace;
  request.ranges = StepRanges(options.method, trace.prompt_tokens(), options.steps);
  request.budgets = RisingBudgets(options);
  request.keep_exact = true;
  CKV_ASSIGN_OR_RETURN(const Evaluation evaluation, Evaluate(request, threads));
  return RunWorker(options, trace, evaluation.exact, threads, progress);
}

}  // namespace

absl::StatusOr<ServiceTotals> RunWorkerProcesses(const ReplayOptions& options, const Trace& trace,
                                                 const std::vector<std::string>& arguments,
                                                 Progress& progress) {
  std::vector<Worker> workers;
  for (uint32_t i = 0; i < options.workers; ++i) {
    CKV_ASSIGN_OR_RETURN(Worker worker, Worker::Start(options, arguments, i));
    workers.push_back(std::move(worker));
  }
  ReadAll(workers, progress);
  ServiceTotals totals;
  absl::Status first_error;
  for (size_t i = 0; i < workers.size(); ++i) {
    absl::StatusOr<ServiceTotals> result =
        workers[i].Finish(options.budgets.size(), trace.layers().size());
    if (result.ok()) {
      totals.Merge(*result);
    } else if (first_error.ok()) {
      first_error = absl::Status(result.status().code(),
                                 absl::StrCat("worker ", i, ": ", result.status().message()));
    }
  }
  if (!first_error.ok()) return first_error;
  return totals;
}

absl::Status RunAsWorkerProcess(const ReplayOptions& options, const Trace& trace) {
  uint64_t unsent = 0;
  Progress progress(/*draw=*/false, [&](uint64_t steps) {
    unsent += steps;
    if (unsent < kStepsPerMessage) return;
    WriteLine(options.result_fd, {{"steps", std::exchange(unsent, 0)}}).IgnoreError();
  });
  const absl::StatusOr<ServiceTotals> totals = EvaluateAndRun(options, trace, progress);
  if (totals.ok()) return WriteLine(options.result_fd, {{"result", ToJson(*totals)}});
  const absl::Status& status = totals.status();
  return WriteLine(
      options.result_fd,
      {{"error",
        {{"code", static_cast<int>(status.code())}, {"message", std::string(status.message())}}}});
}

}  // namespace clusterkv::client::replay
