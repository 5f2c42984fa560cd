// The replay's result, as a table for people and as the contract's JSON.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "client/replay/evaluation.h"
#include "client/replay/options.h"
#include "client/replay/service_totals.h"
#include "client/replay/step_range.h"
#include "client/replay/trace.h"

namespace clusterkv::client::replay {

struct ReportRow {
  std::string method;
  uint32_t budget = 0;
  std::optional<uint32_t> layer;  // the model's index; nullopt: all layers
  double recall = 0.0;
  double output_error = 0.0;
  double mass = 0.0;
  std::optional<double> hit_rate;             // not for the baselines
  std::optional<double> host_bytes_per_step;  // not for the baselines
  double window_tokens_mean = 0.0;
  double candidate_tokens_mean = 0.0;
};

// Hits of clusterkv with one size of the cluster cache.
struct CacheRow {
  uint32_t cache_tokens = 0;  // per (layer, KV head); never 0
  uint32_t budget = 0;
  std::optional<uint32_t> layer;  // the model's index; nullopt: all layers
  double hit_rate = 0.0;
  double host_bytes_per_step = 0.0;
};

struct Report {
  std::string trace;
  std::string model;
  std::string shape;  // for people
  std::string backend;
  std::string mode;
  std::string device;
  uint64_t seed = 0;
  std::string preset;
  gpu::MethodOptions method;
  std::optional<gpu::GroupRule> quest_group;
  std::vector<ReportRow> rows;  // by method, budget, layer; "all" after its layers
  // The run's own size and those of the sweep; empty without a sweep. By size, budget, layer.
  std::vector<CacheRow> cache_rows;
};

// What a report is made of; `budgets` of evaluation and totals are the options', rising.
struct ReportSource {
  const ReplayOptions* options = nullptr;
  const Trace* trace = nullptr;
  const std::vector<StepRange>* ranges = nullptr;
  const Evaluation* evaluation = nullptr;
  const ServiceTotals* service = nullptr;  // null without clusterkv
  std::vector<ServiceTotals> cache_sweep;  // of the options' sizes
  std::string backend;
  std::string device;
};

Report BuildReport(const ReportSource& source);
// The lowest error at a budget, over all layers, of a method that does not know every score.
double LowestError(const std::vector<ReportRow>& rows, uint32_t budget);
// One line of JSON, with the newline.
std::string ReportJson(const Report& report);
std::string ReportTable(const Report& report);

}  // namespace clusterkv::client::replay
