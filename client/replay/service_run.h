// The replay as a worker process: sequences of a trace are ingested and decoded against a daemon,
// and what comes back is measured.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/replay/dump.h"
#include "client/replay/evaluation.h"
#include "client/replay/options.h"
#include "client/replay/service_totals.h"
#include "client/replay/step_range.h"
#include "client/replay/trace.h"
#include "gpu/host/thread_pool.h"

namespace clusterkv::client::replay {

struct ServiceRunOptions {
  const Trace* trace = nullptr;
  gpu::MethodOptions method;  // its budget is the run's; sequence i gets seed + i
  std::vector<StepRange> ranges;
  FetchMode mode = FetchMode::kDirect;
  Publish publish = Publish::kSync;
  uint32_t sequences = 1;
  const ExactTable* exact = nullptr;      // of these ranges
  size_t count_index = 0;                 // of this budget in the table
  OutputDump* dump = nullptr;             // of sequence 0; null: none
  std::function<void(uint64_t)> advance;  // steps done
};

// One budget. Per layer, sums over the sequences.
// Errors: those of the client; INTERNAL where the service breaks the contract (the cut is not the
// schedule's, a position that is no candidate, a wrong number of them); CANCELLED.
absl::StatusOr<std::vector<LayerTotals>> RunService(Client& client,
                                                    const ServiceRunOptions& options,
                                                    gpu::host::ThreadPool& threads);

}  // namespace clusterkv::client::replay
