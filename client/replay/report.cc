#include "client/replay/report.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "client/replay/preset_keys.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"

namespace clusterkv::client::replay {
namespace {

std::vector<uint32_t> Rising(std::vector<uint32_t> budgets) {
  std::sort(budgets.begin(), budgets.end());
  return budgets;
}

// The rows of one method and budget: each layer, then their mean ("all").
class RowBuilder {
 public:
  explicit RowBuilder(const ReportSource& source) : source_(source) {
    double window = 0.0;
    double candidates = 0.0;
    for (const StepRange& range : *source.ranges) {
      window += range.window_tokens();
      candidates += range.candidates();
    }
    const double steps = static_cast<double>(source.ranges->size());
    scheduled_window_ = window / steps;
    scheduled_candidates_ = candidates / steps;
  }

  void AddRows(const std::string& method, uint32_t budget, const std::vector<Measures>& layers,
               std::vector<ReportRow>& rows) const {
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      ReportRow row = MeasuresRow(method, budget, layer, layers[layer]);
      row.window_tokens_mean = scheduled_window_;
      row.candidate_tokens_mean = scheduled_candidates_;
      rows.push_back(std::move(row));
    }
    AddMean(layers.size(), rows);
  }

  void AddServiceRows(uint32_t budget, const std::vector<LayerTotals>& layers,
                      std::vector<ReportRow>& rows) const {
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      const LayerTotals& totals = layers[layer];
      ReportRow row = MeasuresRow("clusterkv", budget, layer, totals.measures);
      row.hit_rate = totals.HitRate();
      row.host_bytes_per_step = totals.HostBytesPerStep();
      const double steps = static_cast<double>(totals.steps);
      row.window_tokens_mean = static_cast<double>(totals.window_tokens) / steps;
      row.candidate_tokens_mean = static_cast<double>(totals.candidate_tokens) / steps;
      rows.push_back(std::move(row));
    }
    AddMean(layers.size(), rows);
  }

 private:
  ReportRow MeasuresRow(const std::string& method, uint32_t budget, size_t layer,
                        const Measures& sums) const {
    const Measures mean = sums.Mean();
    ReportRow row;
    row.method = method;
    row.budget = budget;
    row.layer = source_.trace->layers()[layer].index;
    row.recall = mean.recall;
    row.output_error = mean.output_error;
    row.mass = mean.mass;
    return row;
  }

  // Means of the last `layers` rows; bytes are summed.
  static void AddMean(size_t layers, std::vector<ReportRow>& rows) {
    const size_t first = rows.size() - layers;
    ReportRow all = rows[first];
    all.layer = std::nullopt;
    const auto mean = [&](double ReportRow::*field) {
      double sum = 0.0;
      for (size_t i = first; i < first + layers; ++i) sum += rows[i].*field;
      all.*field = sum / static_cast<double>(layers);
    };
    mean(&ReportRow::recall);
    mean(&ReportRow::output_error);
    mean(&ReportRow::mass);
    mean(&ReportRow::window_tokens_mean);
    mean(&ReportRow::candidate_tokens_mean);
    if (all.hit_rate) {
      *all.hit_rate = *all.host_bytes_per_step = 0.0;
      for (size_t i = first; i < first + layers; ++i) {
        *all.hit_rate += *rows[i].hit_rate / static_cast<double>(layers);
        *all.host_bytes_per_step += *rows[i].host_bytes_per_step;
      }
    }
    rows.push_back(std::move(all));
  }

  const ReportSource& source_;
  double scheduled_window_ = 0.0;
  double scheduled_candidates_ = 0.0;
};

Baseline BaselineOf(Method method, const std::optional<gpu::GroupRule>& quest_group) {
  if (method == Method::kWindow) return Baseline::kWindow;
  if (method == Method::kOracle) return Baseline::kOracle;
  return QuestBaseline(quest_group.value_or(gpu::GroupRule::kSoftmax));
}

nlohmann::ordered_json OrNull(const std::optional<double>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

// Of one size of the cache; budgets that it is too small for were not run.
void AddCacheRows(const ReportSource& source, uint32_t size, const ServiceTotals& totals,
                  std::vector<CacheRow>& rows) {
  ReplayOptions sized = *source.options;
  sized.method.cache_tokens = size;
  const std::vector<uint32_t> rising = Rising(source.options->budgets);
  for (size_t i = 0; i < rising.size(); ++i) {
    const std::vector<LayerTotals>& layers = totals.budgets[i];
    if (layers.front().steps == 0) continue;
    CacheRow row;
    row.cache_tokens = MethodForBudget(sized, *source.trace, rising[i])
                           .Resolved(source.trace->shape())
                           .cache_tokens;
    row.budget = rising[i];
    CacheRow all = row;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      row.layer = source.trace->layers()[layer].index;
      row.hit_rate = layers[layer].HitRate();
      row.host_bytes_per_step = layers[layer].HostBytesPerStep();
      all.hit_rate += row.hit_rate / static_cast<double>(layers.size());
      all.host_bytes_per_step += row.host_bytes_per_step;
      rows.push_back(row);
    }
    rows.push_back(all);
  }
}

nlohmann::ordered_json LayerJson(const std::optional<uint32_t>& layer) {
  return layer ? nlohmann::ordered_json(*layer) : nlohmann::ordered_json("all");
}

std::string Heading(const Report& report) {
  const gpu::MethodOptions& method = report.method;
  std::string text = fmt::format("{}: {}\n{}\n", report.trace, report.model, report.shape);
  text += fmt::format(
      "preset {}: {} tokens per cluster, group {}{}{}, sinks {}, window at least {}, prompt "
      "segments {}, decode segments {}\n",
      report.preset, method.tokens_per_cluster, gpu::GroupRuleName(method.group),
      method.center_keys ? ", centred keys" : "", method.estimate ? ", estimate" : "",
      method.sink_tokens, method.min_window_tokens, method.prompt_segment_tokens,
      method.decode_segment_tokens);
  text += fmt::format("{} fetch, backend {} ({}), seed {}\n", report.mode, report.backend,
                      report.device, report.seed);
  return text;
}

// One line for each size and budget.
std::string CacheTable(const Report& report) {
  std::string text = fmt::format("\n{:>7} {:>13} {:>9} {:>9} {:>12}\n", "budget", "cache tokens",
                                 "hit rate", "worst", "KiB/step");
  double worst = 1.0;
  for (const CacheRow& row : report.cache_rows) {
    if (row.layer) {
      worst = std::min(worst, row.hit_rate);
      continue;
    }
    text +=
        fmt::format("{:>7} {:>13} {:>8.1f}% {:>8.1f}% {:>12.1f}\n", row.budget, row.cache_tokens,
                    100 * row.hit_rate, 100 * worst, row.host_bytes_per_step / 1024);
    worst = 1.0;
  }
  return text;
}

std::string TableRow(const Report& report, const ReportRow& row, double lowest_error,
                     std::optional<double> worst_hit_rate) {
  std::string name = row.method;
  if (name == MethodName(Method::kQuest) && report.quest_group) {
    name += fmt::format(" ({})", gpu::GroupRuleName(*report.quest_group));
  }
  const bool best = row.output_error == lowest_error && row.method != MethodName(Method::kOracle);
  std::string text = fmt::format("{:>7}  {:<16} {:>7.3f} {:>12.4f}{} {:>8.4f}", row.budget, name,
                                 row.recall, row.output_error, best ? "*" : " ", row.mass);
  if (row.hit_rate && row.host_bytes_per_step) {
    text +=
        fmt::format(" {:>8.1f}% {:>8.1f}% {:>12.1f}", 100 * *row.hit_rate,
                    100 * worst_hit_rate.value_or(*row.hit_rate), *row.host_bytes_per_step / 1024);
  } else {
    text += fmt::format(" {:>9} {:>9} {:>12}", "-", "-", "-");
  }
  return text + "\n";
}

}  // namespace

double LowestError(const std::vector<ReportRow>& rows, uint32_t budget) {
  double lowest = std::numeric_limits<double>::infinity();
  for (const ReportRow& row : rows) {
    if (row.layer || row.budget != budget || row.method == MethodName(Method::kOracle)) continue;
    lowest = std::min(lowest, row.output_error);
  }
  return lowest;
}

Report BuildReport(const ReportSource& source) {
  const ReplayOptions& options = *source.options;
  const gpu::Shape& shape = source.trace->shape();
  Report report;
  report.trace = options.trace;
  report.model = source.trace->model();
  report.shape = fmt::format(
      "{} prompt tokens, {} decode steps; {} layers, {} KV heads, {} query heads, head dim {}, {}",
      source.trace->prompt_tokens(), source.ranges->size(), shape.layers, shape.kv_heads,
      shape.q_heads, shape.head_dim, gpu::DTypeName(shape.dtype));
  report.backend = source.backend;
  report.mode = ModeName(options.mode);
  report.device = source.device;
  report.seed = options.seed;
  report.preset = options.preset;
  report.method = options.method;
  if (options.Has(Method::kQuest)) report.quest_group = BestQuestRule(*source.evaluation);
  const RowBuilder builder(source);
  const std::vector<uint32_t> rising = Rising(options.budgets);
  for (const Method method : options.methods) {
    for (const uint32_t budget : options.budgets) {
      const auto index = static_cast<size_t>(
          std::lower_bound(rising.begin(), rising.end(), budget) - rising.begin());
      if (method == Method::kClusterkv) {
        builder.AddServiceRows(budget, source.service->budgets[index], report.rows);
        continue;
      }
      const auto baseline = static_cast<size_t>(BaselineOf(method, report.quest_group));
      builder.AddRows(MethodName(method), budget, source.evaluation->baselines[baseline][index],
                      report.rows);
    }
  }
  if (!source.cache_sweep.empty()) {
    AddCacheRows(source, options.method.cache_tokens, *source.service, report.cache_rows);
    for (size_t i = 0; i < source.cache_sweep.size(); ++i) {
      AddCacheRows(source, options.cache_sweep[i], source.cache_sweep[i], report.cache_rows);
    }
  }
  return report;
}

std::string ReportJson(const Report& report) {
  nlohmann::ordered_json preset = {{"name", report.preset}};
  preset.update(PresetKeys(report.method));
  preset["quest_group"] = nullptr;
  if (report.quest_group) preset["quest_group"] = gpu::GroupRuleName(*report.quest_group);
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const ReportRow& row : report.rows) {
    results.push_back({{"method", row.method},
                       {"budget", row.budget},
                       {"layer", LayerJson(row.layer)},
                       {"recall", row.recall},
                       {"output_error", row.output_error},
                       {"mass", row.mass},
                       {"hit_rate", OrNull(row.hit_rate)},
                       {"host_bytes_per_step", OrNull(row.host_bytes_per_step)},
                       {"window_tokens_mean", row.window_tokens_mean},
                       {"candidate_tokens_mean", row.candidate_tokens_mean}});
  }
  nlohmann::ordered_json json = {{"trace", report.trace}, {"backend", report.backend},
                                 {"mode", report.mode},   {"device", report.device},
                                 {"seed", report.seed},   {"preset", preset},
                                 {"results", results}};
  for (const CacheRow& row : report.cache_rows) {
    json["cache_sweep"].push_back({{"cache_tokens", row.cache_tokens},
                                   {"budget", row.budget},
                                   {"layer", LayerJson(row.layer)},
                                   {"hit_rate", row.hit_rate},
                                   {"host_bytes_per_step", row.host_bytes_per_step}});
  }
  // A path need not be UTF-8.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

std::string ReportTable(const Report& report) {
  std::string text = Heading(report);
  text += fmt::format("\n{:>7}  {:<16} {:>7} {:>12}  {:>8} {:>9} {:>9} {:>12}\n", "budget",
                      "method", "recall", "output error", "mass", "hit rate", "worst", "KiB/step");
  std::vector<uint32_t> budgets;
  for (const ReportRow& row : report.rows) {
    if (std::find(budgets.begin(), budgets.end(), row.budget) == budgets.end()) {
      budgets.push_back(row.budget);
    }
  }
  for (const uint32_t budget : budgets) {
    text += std::string(88, '-') + "\n";
    const double lowest = LowestError(report.rows, budget);
    std::optional<double> worst;
    for (const ReportRow& row : report.rows) {
      if (row.budget != budget) continue;
      if (!row.layer) {
        text += TableRow(report, row, lowest, worst);
        worst = std::nullopt;
      } else if (row.hit_rate) {
        worst = std::min(worst.value_or(*row.hit_rate), *row.hit_rate);
      }
    }
  }
  if (!report.cache_rows.empty()) text += CacheTable(report);
  if (!report.rows.empty()) {
    text += fmt::format(
        "\nMeans over layers, steps and query heads. * lowest error but for the oracle, which "
        "knows "
        "every score.\nEvery method also attends to the {} sinks and to a window of {:.1f} tokens; "
        "{:.1f} candidates (both means).\nhit rate: clusters found in the cache, in all layers and "
        "in the worst; KiB/step: read from the host store, all layers.\n",
        report.method.sink_tokens, report.rows.back().window_tokens_mean,
        report.rows.back().candidate_tokens_mean);
  }
  return text;
}

}  // namespace clusterkv::client::replay
