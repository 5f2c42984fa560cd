#include "client/bench/report.h"

#include <cmath>
#include <utility>

#include "fmt/format.h"

namespace clusterkv::client::bench {
namespace {

using Json = nlohmann::ordered_json;

double RatioOf(const Row& row) {
  return row.time.median > 0.0 ? row.floor.microseconds / row.time.median : 0.0;
}

Json Whole(double count) { return static_cast<uint64_t>(std::llround(count)); }

Json OrNull(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

Json RowJson(const Report& report, const Row& row) {
  Json json = {{"op", row.operation},
               {"shape", row.shape},
               {"median_us", row.time.median},
               {"p99_us", row.time.p99},
               {"bytes", Whole(row.floor.bytes)},
               {"flops", Whole(row.work.flops)},
               {"floor_us", row.floor.microseconds},
               {"ceiling", row.floor.ceiling},
               {"ratio", RatioOf(row)},
               {"device", report.device},
               {"driver", OrNull(report.driver)}};
  if (row.extra.is_object()) json.update(row.extra);
  return json;
}

// "context 32768, batch 1": strings and numbers as they are, what is false or empty left out.
std::string Pairs(const Json& object) {
  std::string text;
  for (const auto& [key, value] : object.items()) {
    std::string shown = value.is_string() ? value.get<std::string>() : value.dump();
    if (value.is_number_float()) shown = fmt::format("{:.4g}", value.get<double>());
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", key, shown);
  }
  return text;
}

std::string Rate(double per_second, const char* unit) {
  return per_second > 0.0 ? fmt::format("{:.1f} {}", per_second / 1e9, unit) : "not measured";
}

}  // namespace

Row MakeRow(std::string operation, Json shape, std::vector<double> samples, const Work& work,
            const Ceilings& ceilings) {
  Row row;
  row.operation = std::move(operation);
  row.shape = std::move(shape);
  row.time = Summarize(std::move(samples));
  row.work = work;
  row.floor = FloorOf(work, ceilings);
  return row;
}

std::string ReportJson(const Report& report) {
  Json rows = Json::array();
  for (const Row& row : report.rows) rows.push_back(RowJson(report, row));
  const Json json = {{"backend", report.backend},
                     {"device", report.device},
                     {"driver", OrNull(report.driver)},
                     {"seed", report.seed},
                     {"repeats", report.repeats},
                     {"preset", report.preset},
                     {"ceilings",
                      {{"hbm-copy", report.ceilings.device_copy},
                       {"h2d", report.ceilings.to_device},
                       {"d2h", report.ceilings.to_host},
                       {"flops", report.ceilings.flops}}},
                     {"notes", report.notes},
                     {"rows", rows}};
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string ReportText(const Report& report) {
  std::string text =
      fmt::format("backend {} ({}{}{}), preset {}, seed {}, {} repeats\n", report.backend,
                  report.device, report.driver.empty() ? "" : ", driver ", report.driver,
                  report.preset, report.seed, report.repeats);
  text += fmt::format(
      "ceilings: device copy {}, to device {}, to host {}, products {}\n\n",
      Rate(report.ceilings.device_copy, "GB/s"), Rate(report.ceilings.to_device, "GB/s"),
      Rate(report.ceilings.to_host, "GB/s"), Rate(report.ceilings.flops, "GFLOP/s"));
  text += fmt::format("{:<16} {:>12} {:>12} {:>12} {:>6} {:<9} {}\n", "operation", "median us",
                      "p99 us", "floor us", "ratio", "ceiling", "shape");
  for (const Row& row : report.rows) {
    text += fmt::format("{:<16} {:>12.2f} {:>12.2f} {:>12.2f} {:>6.3f} {:<9} {}", row.operation,
                        row.time.median, row.time.p99, row.floor.microseconds, RatioOf(row),
                        row.floor.ceiling, Pairs(row.shape));
    if (row.extra.is_object()) text += fmt::format("; {}", Pairs(row.extra));
    text += "\n";
  }
  for (const std::string& note : report.notes) text += "note: " + note + "\n";
  return text;
}

}  // namespace clusterkv::client::bench
