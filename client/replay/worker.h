// One worker: a session with the daemon that replays the trace at every budget.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "client/replay/evaluation.h"
#include "client/replay/options.h"
#include "client/replay/progress.h"
#include "client/replay/service_totals.h"
#include "client/replay/trace.h"
#include "gpu/host/thread_pool.h"

namespace clusterkv::client::replay {

// `options.connect` says where; `exact` is of all steps and budgets. Worker 0 writes the dump.
// Errors: those of the client; INVALID_ARGUMENT if the daemon's backend is not the wanted one.
absl::StatusOr<ServiceTotals> RunWorker(const ReplayOptions& options, const Trace& trace,
                                        const ExactTable& exact, gpu::host::ThreadPool& threads,
                                        Progress& progress);

// Steps that RunWorker reports to `progress`.
uint64_t WorkerSteps(const ReplayOptions& options);

// Cores that this process may run on.
int CoresOfThisProcess();

// Budgets in rising order, as Evaluation and ServiceTotals have them.
std::vector<uint32_t> RisingBudgets(const ReplayOptions& options);

}  // namespace clusterkv::client::replay
