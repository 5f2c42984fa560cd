// The bench's result: rows as the contract has them, as JSON and as a table.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client/bench/ceilings.h"
#include "client/bench/statistics.h"
#include "nlohmann/json.hpp"

namespace clusterkv::client::bench {

// NOLINTNEXTLINE(bugprone-exception-escape): JSON values move without throwing.
struct Row {
  std::string operation;
  nlohmann::ordered_json shape;  // an object
  Summary time;                  // microseconds
  Work work;
  Floor floor;
  nlohmann::ordered_json extra;  // more keys of the row; null: none
};

struct Report {
  std::string backend;
  std::string device;
  std::string driver;  // empty: none
  uint64_t seed = 0;
  uint32_t repeats = 0;
  std::string preset;
  Ceilings ceilings;
  std::vector<Row> rows;
  std::vector<std::string> notes;  // what was left out, and why; what a figure leaves out
};

// Floor and ratio from what the run has measured.
Row MakeRow(std::string operation, nlohmann::ordered_json shape, std::vector<double> samples,
            const Work& work, const Ceilings& ceilings);

// One line of JSON, with the newline.
std::string ReportJson(const Report& report);
std::string ReportText(const Report& report);

}  // namespace clusterkv::client::bench
