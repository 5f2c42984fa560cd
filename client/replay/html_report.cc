#include "client/replay/html_report.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_replace.h"
#include "client/replay/html_page.h"
#include "client/replay/preset_keys.h"
#include "client/replay/svg_chart.h"
#include "fmt/format.h"

namespace clusterkv::client::replay {
namespace {

// As given on the command line.
std::vector<std::string> MethodsOf(const Report& report) {
  std::vector<std::string> methods;
  for (const ReportRow& row : report.rows) {
    if (std::ranges::find(methods, row.method) == methods.end()) methods.push_back(row.method);
  }
  return methods;
}

std::set<uint32_t> BudgetsOf(const Report& report) {
  std::set<uint32_t> budgets;
  for (const ReportRow& row : report.rows) budgets.insert(row.budget);
  return budgets;
}

// The same look in every chart, whatever methods were asked for.
size_t LookOf(const std::string& method) {
  const Method order[] = {Method::kClusterkv, Method::kQuest, Method::kWindow, Method::kOracle};
  for (size_t i = 0; i < std::size(order); ++i) {
    if (method == MethodName(order[i])) return i;
  }
  return kChartLooks - 1;
}

std::string NameOf(const Report& report, const std::string& method) {
  if (method != MethodName(Method::kQuest) || !report.quest_group) return method;
  return fmt::format("{} ({})", method, gpu::GroupRuleName(*report.quest_group));
}

// One line for each method, over the budgets.
Chart OverBudget(const Report& report, const std::string& title, const std::string& label,
                 double ReportRow::*value, bool percent) {
  Chart chart{.title = title, .x_label = "budget", .y_label = label, .series = {}};
  chart.percent = percent;
  for (const std::string& method : MethodsOf(report)) {
    std::map<uint32_t, double> values;
    for (const ReportRow& row : report.rows) {
      if (row.method == method && !row.layer) values[row.budget] = row.*value;
    }
    ChartSeries series{.name = NameOf(report, method), .look = LookOf(method), .points = {}};
    for (const auto& [budget, y] : values) series.points.push_back({double(budget), y, {}});
    chart.series.push_back(std::move(series));
  }
  return chart;
}

// The mean over the layers, and the worst of them.
Chart HitRateOverBudget(const Report& report) {
  Chart chart{.title = "Clusters found in the cache, over the budget",
              .x_label = "budget",
              .y_label = "hit rate",
              .series = {}};
  chart.percent = true;
  chart.from_zero = false;
  std::map<uint32_t, double> mean, worst;
  for (const ReportRow& row : report.rows) {
    if (!row.hit_rate) continue;
    if (!row.layer) {
      mean[row.budget] = *row.hit_rate;
    } else {
      const auto found = worst.try_emplace(row.budget, *row.hit_rate).first;
      found->second = std::min(found->second, *row.hit_rate);
    }
  }
  for (const auto& [name, look, values] :
       {std::tuple("mean of the layers", 0, &mean), std::tuple("worst layer", 4, &worst)}) {
    ChartSeries series{.name = name, .look = static_cast<size_t>(look), .points = {}};
    for (const auto& [budget, y] : *values) series.points.push_back({double(budget), y, {}});
    chart.series.push_back(std::move(series));
  }
  return chart;
}

// One line for each budget, over the sizes of the cache.
Chart HitRateOverCache(const Report& report) {
  Chart chart{.title = "Clusters found in the cache, over its size",
              .x_label = "cache tokens",
              .y_label = "hit rate, mean of the layers",
              .series = {}};
  chart.percent = true;
  chart.from_zero = false;
  std::map<uint32_t, std::map<uint32_t, double>> lines;
  for (const CacheRow& row : report.cache_rows) {
    if (!row.layer) lines[row.budget][row.cache_tokens] = row.hit_rate;
  }
  for (const auto& [budget, values] : lines) {
    ChartSeries series{
        .name = fmt::format("budget {}", budget), .look = chart.series.size(), .points = {}};
    for (const auto& [tokens, y] : values) {
      series.points.push_back(
          {double(tokens), y,
           fmt::format("{} tokens, {:.1f} budgets", tokens, double(tokens) / double(budget))});
    }
    chart.series.push_back(std::move(series));
  }
  return chart;
}

// One line for each budget.
Chart OverLayers(const Report& report, const std::string& title, const std::string& label,
                 bool percent, std::optional<double> (*value)(const ReportRow&)) {
  Chart chart{.title = title, .x_label = "layer", .y_label = label, .series = {}};
  chart.percent = percent;
  chart.from_zero = !percent;
  chart.linear_x = true;
  for (const uint32_t budget : BudgetsOf(report)) {
    ChartSeries series{
        .name = fmt::format("budget {}", budget), .look = chart.series.size(), .points = {}};
    for (const ReportRow& row : report.rows) {
      const std::optional<double> y = value(row);
      if (row.budget == budget && row.layer && y) {
        series.points.push_back({double(*row.layer), *y, {}});
      }
    }
    std::ranges::sort(series.points, {}, &ChartPoint::x);
    if (!series.points.empty()) chart.series.push_back(std::move(series));
  }
  return chart;
}

std::string Heading(const Report& report) {
  std::string html = fmt::format("<h1>{}</h1>\n<p>{}<br>{}</p>\n", HtmlText(report.trace),
                                 HtmlText(report.model), HtmlText(report.shape));
  html += fmt::format(
      "<p class=\"quiet\">{} fetch, backend {} ({}), seed {}; preset {}:", HtmlText(report.mode),
      HtmlText(report.backend), HtmlText(report.device), report.seed, HtmlText(report.preset));
  const nlohmann::ordered_json preset = PresetKeys(report.method);
  for (const auto& [key, value] : preset.items()) {
    html += fmt::format(" {}={}", HtmlText(key),
                        HtmlText(value.is_string() ? value.get<std::string>() : value.dump()));
  }
  return html + "</p>\n";
}

std::string Number(const std::optional<double>& value, int digits, double scale = 1) {
  return value ? fmt::format("{:.{}f}", scale * *value, digits) : "\xe2\x80\x93";
}

// All layers together; the lowest error of a budget but for the oracle's is marked.
std::string Summary(const Report& report) {
  std::string html =
      "<div class=\"box scroll\"><table id=\"summary\"><thead><tr><th>budget</th><th "
      "class=\"text\">method</th>"
      "<th>recall</th><th>output error</th><th>mass</th><th>hit rate</th><th>KiB a step</th></tr>"
      "</thead><tbody>\n";
  for (const uint32_t budget : BudgetsOf(report)) {
    const double lowest = LowestError(report.rows, budget);
    for (const ReportRow& row : report.rows) {
      if (row.budget != budget || row.layer) continue;
      const bool best = row.output_error == lowest && row.method != MethodName(Method::kOracle);
      html += fmt::format(
          "<tr><td>{}</td><td class=\"text\">{}</td><td>{:.3f}</td><td{}>{:.4f}</td><td>{:.4f}</td>"
          "<td>{}{}</td><td>{}</td></tr>\n",
          budget, HtmlText(NameOf(report, row.method)), row.recall, best ? " class=\"best\"" : "",
          row.output_error, row.mass, Number(row.hit_rate, 1, 100), row.hit_rate ? " %" : "",
          Number(row.host_bytes_per_step, 1, 1.0 / 1024));
    }
  }
  return html + "</tbody></table></div>\n";
}

// A row for each layer: recall and error of each method, hits of ours.
std::string LayerTable(const Report& report, uint32_t budget) {
  std::map<uint32_t, std::map<std::string, const ReportRow*>> layers;
  for (const ReportRow& row : report.rows) {
    if (row.budget == budget && row.layer) layers[*row.layer][row.method] = &row;
  }
  const std::vector<std::string> methods = MethodsOf(report);
  std::string html = fmt::format(
      "<details class=\"box\"><summary>Layers at budget {}</summary><div class=\"scroll\"><table>"
      "<thead><tr><th>layer</th>",
      budget);
  for (const char* what : {"recall", "error"}) {
    for (const std::string& method : methods) {
      html += fmt::format("<th>{}<br>{}</th>", HtmlText(NameOf(report, method)), what);
    }
  }
  html += "<th>hit rate</th><th>KiB a step</th></tr></thead><tbody>\n";
  for (const auto& [layer, rows] : layers) {
    html += fmt::format("<tr><td>{}</td>", layer);
    const ReportRow* ours = nullptr;
    for (const auto& [field, digits] :
         {std::pair(&ReportRow::recall, 3), std::pair(&ReportRow::output_error, 4)}) {
      for (const std::string& method : methods) {
        const auto found = rows.find(method);
        if (found != rows.end() && found->second->hit_rate) ours = found->second;
        html +=
            fmt::format("<td>{}</td>", found == rows.end() ? Number(std::nullopt, 0)
                                                           : Number(found->second->*field, digits));
      }
    }
    const std::optional<double> nothing;
    html += fmt::format("<td>{}</td><td>{}</td></tr>\n",
                        Number(ours ? ours->hit_rate : nothing, 1, 100),
                        Number(ours ? ours->host_bytes_per_step : nothing, 1, 1.0 / 1024));
  }
  return html + "</tbody></table></div></details>\n";
}

std::string Charts(const Report& report, bool hits) {
  std::string html = "<div class=\"charts\">\n";
  html += ChartHtml(OverBudget(report, "Recall: the query heads' own top tokens that were chosen",
                               "recall", &ReportRow::recall, true));
  html += ChartHtml(OverBudget(report, "Error of the attention output", "relative error",
                               &ReportRow::output_error, false));
  html += ChartHtml(
      OverBudget(report, "Attention mass that was attended to", "mass", &ReportRow::mass, true));
  if (hits) {
    html +=
        ChartHtml(report.cache_rows.empty() ? HitRateOverBudget(report) : HitRateOverCache(report));
  }
  return html + "</div>\n";
}

std::string Body(const Report& report) {
  const bool hits = std::ranges::any_of(
      report.rows, [](const ReportRow& row) { return row.hit_rate.has_value(); });
  std::string html = Heading(report) + "<h2>Over the budget</h2>\n" + Charts(report, hits);
  if (hits && report.cache_rows.empty()) {
    html +=
        "<p class=\"quiet\">One size of the cache was measured; for the hit rate over its size "
        "give "
        "several: --cache-tokens 4096,8192,16384.</p>\n";
  }
  html += "<h2>All layers</h2>\n" + Summary(report);
  if (!report.rows.empty()) {
    html += fmt::format(
        "<p class=\"quiet\">Means over layers, steps and query heads; bold: the lowest error but "
        "for "
        "the oracle, which knows every score. Every method also attends to the {} sinks and to a "
        "window of {:.1f} tokens; {:.1f} candidates (both means).</p>\n",
        report.method.sink_tokens, report.rows.back().window_tokens_mean,
        report.rows.back().candidate_tokens_mean);
  }
  html += "<h2>Layer by layer</h2>\n<div class=\"charts\">\n";
  html += ChartHtml(OverLayers(
      report, "Output error of clusterkv", "relative error", false, [](const ReportRow& row) {
        return row.method == MethodName(Method::kClusterkv) ? std::optional(row.output_error)
                                                            : std::nullopt;
      }));
  html += ChartHtml(OverLayers(report, "Clusters found in the cache", "hit rate", true,
                               [](const ReportRow& row) { return row.hit_rate; }));
  html += "</div>\n";
  for (const uint32_t budget : BudgetsOf(report)) html += LayerTable(report, budget);
  return html + fmt::format(
                    "<details class=\"box\"><summary>As JSON</summary><pre "
                    "id=\"json\">{}</pre></details>\n",
                    HtmlText(ReportJson(report)));
}

}  // namespace

std::string ReportHtml(const Report& report) {
  // In one pass, so that a name that looks like a mark stays a name.
  return absl::StrReplaceAll({kReportPage.data(), kReportPage.size()},
                             {{"REPORT_TITLE", HtmlText("clusterkv-replay " + report.trace)},
                              {"REPORT_BODY", Body(report)}});
}

}  // namespace clusterkv::client::replay
