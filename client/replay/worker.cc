#include "client/replay/worker.h"

#include <sched.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "client/replay/dump.h"
#include "client/replay/service_run.h"
#include "client/replay/step_range.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::replay {
namespace {

absl::StatusOr<std::unique_ptr<Client>> ConnectTo(const ReplayOptions& options, uint32_t worker) {
  ClientOptions client_options;
  client_options.address = options.connect;
  client_options.name = absl::StrCat("clusterkv-replay/", worker);
  client_options.audit_rate = options.audit_rate;
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Connect(client_options));
  if (options.backend != "auto" && client->backend() != options.backend) {
    return absl::InvalidArgumentError(absl::StrCat("--backend is \"", options.backend,
                                                   "\"; the daemon at ", options.connect, " runs ",
                                                   client->backend()));
  }
  return client;
}

}  // namespace

int CoresOfThisProcess() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return 1;
}

uint64_t WorkerSteps(const ReplayOptions& options) {
  return uint64_t{options.steps} * options.budgets.size();
}

std::vector<uint32_t> RisingBudgets(const ReplayOptions& options) {
  std::vector<uint32_t> budgets = options.budgets;
  std::sort(budgets.begin(), budgets.end());
  return budgets;
}

absl::StatusOr<ServiceTotals> RunWorker(const ReplayOptions& options, const Trace& trace,
                                        const ExactTable& exact, gpu::host::ThreadPool& threads,
                                        Progress& progress) {
  const uint32_t worker = options.worker_index.value_or(0);
  CKV_ASSIGN_OR_RETURN(const std::unique_ptr<Client> client, ConnectTo(options, worker));
  const std::vector<uint32_t> rising = RisingBudgets(options);
  ServiceTotals totals;
  totals.backend = client->backend();
  totals.budgets.resize(rising.size());
  for (size_t i = 0; i < rising.size(); ++i) {
    ServiceRunOptions run;
    run.trace = &trace;
    run.method = MethodForBudget(options, trace, rising[i]);
    if (!run.method.Validate().ok()) {  // a size of the sweep that is too small for this budget
      totals.budgets[i].resize(trace.layers().size());
      progress.Advance(options.steps);
      continue;
    }
    run.method.seed += uint64_t{worker} * options.sequences;
    run.ranges = StepRanges(run.method, trace.prompt_tokens(), options.steps);
    run.mode = options.mode;
    run.publish = options.publish;
    run.sequences = options.sequences;
    run.exact = &exact;
    run.count_index = i;
    run.advance = [&progress](uint64_t steps) { progress.Advance(steps); };
    std::optional<OutputDump> dump;
    if (!options.dump_outputs.empty() && worker == 0 && rising[i] == options.budgets[0]) {
      run.dump = &dump.emplace(trace, options.steps, rising[i]);
    }
    absl::StatusOr<std::vector<LayerTotals>> layers = RunService(*client, run, threads);
    if (!layers.ok()) {
      return absl::Status(layers.status().code(),
                          absl::StrCat("budget ", rising[i], ": ", layers.status().message()));
    }
    totals.budgets[i] = *std::move(layers);
    if (dump.has_value()) CKV_RETURN_IF_ERROR(dump->Write(options.dump_outputs));
  }
  return totals;
}

}  // namespace clusterkv::client::replay
