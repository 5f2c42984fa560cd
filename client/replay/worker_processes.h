// Several workers at the same time, each a process of its own that runs this program again and
// tells its progress and result through a pipe, one JSON object a line.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/replay/options.h"
#include "client/replay/progress.h"
#include "client/replay/service_totals.h"
#include "client/replay/trace.h"

namespace clusterkv::client::replay {

// Starts options.workers of them with `arguments` (this program's own, without its name) and
// options.connect, and adds up their results. All others run to their end when one fails.
// Errors: a worker's own; INTERNAL for one that died.
absl::StatusOr<ServiceTotals> RunWorkerProcesses(const ReplayOptions& options, const Trace& trace,
                                                 const std::vector<std::string>& arguments,
                                                 Progress& progress);

// In the worker: runs and writes to options.result_fd. OK once the result is written, even if it
// is an error, which is the parent's to report.
absl::Status RunAsWorkerProcess(const ReplayOptions& options, const Trace& trace);

}  // namespace clusterkv::client::replay
