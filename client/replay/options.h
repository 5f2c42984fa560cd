// The command line of clusterkv-replay.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/replay/trace.h"
#include "gpu/method_options.h"

namespace clusterkv::client::replay {

enum class Method { kClusterkv, kQuest, kWindow, kOracle };
enum class Format { kTable, kJson };
enum class Publish { kSync, kAsync };

const char* MethodName(Method method);
const char* ModeName(FetchMode mode);

struct ReplayOptions {
  std::string trace;
  std::vector<Method> methods;    // distinct, as given
  std::vector<uint32_t> budgets;  // distinct, as given
  std::string preset;
  gpu::MethodOptions method;  // preset and --set; budget, scale and seed are set for each run
  FetchMode mode = FetchMode::kDirect;
  std::string backend;
  std::string connect;  // empty: a private daemon
  uint32_t sequences = 1;
  uint32_t workers = 1;
  uint32_t steps = 0;  // 0: all of the trace
  uint64_t seed = 0;
  double audit_rate = 0;  // of direct steps, that the daemon compares with exact attention
  uint32_t repeat = 1;    // 0: until a signal
  // Further sizes of the cluster cache, distinct: at each one only the hits are measured. A budget
  // that needs more than a size is left out there.
  std::vector<uint32_t> cache_sweep;
  std::string dump_outputs;  // empty: none
  std::string html;          // file of the report for researchers; empty: none
  Format format = Format::kTable;
  Publish publish = Publish::kSync;
  // Set by the replay itself for the processes that it starts.
  std::optional<uint32_t> worker_index;
  int result_fd = -1;

  bool Has(Method wanted) const;
};

// nullopt: the help or the version was asked for and printed.
// Errors: INVALID_ARGUMENT naming the option and what is allowed.
absl::StatusOr<std::optional<ReplayOptions>> ParseOptions(int argc, const char* const* argv);

// What only the trace can tell: --steps, and the method's ranges at every budget. Fills steps.
absl::Status CheckAgainstTrace(const Trace& trace, ReplayOptions& options);

// The method of one run: budget, scale and seed filled in.
gpu::MethodOptions MethodForBudget(const ReplayOptions& options, const Trace& trace,
                                   uint32_t budget);

}  // namespace clusterkv::client::replay
