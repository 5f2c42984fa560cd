// What every measurement reads and writes, and the measurements there are.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "client/bench/backend.h"
#include "client/bench/options.h"
#include "client/bench/report.h"

namespace clusterkv::client::bench {

struct BenchRun {
  const BenchOptions& options;
  Backend& backend;
  Report& report;

  bool is_cuda() const { return backend.device().backend() == "cuda"; }
  void AddRow(std::string operation, nlohmann::ordered_json shape, std::vector<double> samples,
              const Work& work, nlohmann::ordered_json extra = nullptr) const {
    Row row =
        MakeRow(std::move(operation), std::move(shape), std::move(samples), work, report.ceilings);
    row.extra = std::move(extra);
    report.rows.push_back(std::move(row));
  }
  void AddNote(std::string note) const { report.notes.push_back(std::move(note)); }
};

// The ceilings of the report, always; hbm-copy, h2d, d2h as rows if asked for.
absl::Status MeasureCeilings(const BenchRun& run);
absl::Status MeasureGather(const BenchRun& run);
absl::Status MeasureKmeans(const BenchRun& run);
absl::Status MeasurePermute(const BenchRun& run);
// select, fetch, attend, step.
absl::Status MeasureLayers(const BenchRun& run);
absl::Status MeasureDecode(const BenchRun& run);
// With a daemon: in the program, since the library knows nothing of what connects.
absl::Status MeasureServed(const BenchRun& run);

}  // namespace clusterkv::client::bench
