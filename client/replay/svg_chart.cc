#include "client/replay/svg_chart.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "client/valid_utf8.h"
#include "fmt/format.h"

namespace clusterkv::client::replay {
namespace {

constexpr double kWidth = 460, kHeight = 300, kLeft = 58, kRight = 16, kTop = 12, kBottom = 46;
constexpr double kRadius = 4.5;
constexpr size_t kMostLabels = 8;
constexpr int kYSteps = 4;

// 1, 2 or 5 times a power of ten, not below `value`.
double NiceCeiling(double value) {
  const double power = std::pow(10.0, std::floor(std::log10(value)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= value) return factor * power;
  }
  return 10.0 * power;
}

// Where things lie on the paper.
class Scale {
 public:
  explicit Scale(const Chart& chart) : chart_(chart) {
    double least = INFINITY, most = -INFINITY;
    for (const ChartSeries& series : chart.series) {
      for (const ChartPoint& point : series.points) {
        xs_.insert(point.x);
        least = std::min(least, point.y);
        most = std::max(most, point.y);
      }
    }
    if (xs_.empty()) return;
    if (chart.percent) {
      high_ = 1.0;
      if (!chart.from_zero) {
        for (const double low : {0.5, 0.8, 0.9}) {
          if (low < least) low_ = low;
        }
      }
    } else {
      high_ = most > 0.0 ? NiceCeiling(most) : 1.0;
    }
  }

  const std::set<double>& xs() const { return xs_; }
  double low() const { return low_; }
  double high() const { return high_; }

  double X(double value) const {
    const double first = Place(*xs_.begin()), last = Place(*xs_.rbegin());
    const double part = last > first ? (Place(value) - first) / (last - first) : 0.5;
    return kLeft + 14 + part * (kWidth - kLeft - kRight - 28);
  }
  double Y(double value) const {
    return kTop + (1.0 - (value - low_) / (high_ - low_)) * (kHeight - kTop - kBottom);
  }
  std::string YText(double value) const {
    return chart_.percent ? fmt::format("{:.0f} %", 100 * value) : fmt::format("{:.3g}", value);
  }

 private:
  double Place(double x) const { return chart_.linear_x ? x : std::log2(x); }

  const Chart& chart_;
  std::set<double> xs_;
  double low_ = 0.0, high_ = 1.0;
};

std::string Marker(double x, double y, size_t look, const std::string& tooltip) {
  const double r = kRadius;
  const std::string title = fmt::format("<title>{}</title>", HtmlText(tooltip));
  switch (look % kChartLooks) {
    case 0:
      return fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\">{}</circle>", x, y, r,
                         title);
    case 1:
      return fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{}\" height=\"{}\">{}</rect>",
                         x - r, y - r, 2 * r, 2 * r, title);
    case 2:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l{} {}h-{}z\">{}</path>", x, y - r - 1, r + 1,
                         2 * r, 2 * (r + 1), title);
    case 3:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l{} {}l-{} {}l-{} -{}z\">{}</path>", x, y - r - 1,
                         r + 1, r + 1, r + 1, r + 1, r + 1, r + 1, title);
    case 4:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l{} -{}h-{}z\">{}</path>", x, y + r + 1, r + 1,
                         2 * r, 2 * (r + 1), title);
    default:
      return fmt::format("<path d=\"M{:.1f} {:.1f}h{}v{}h-{}z\">{}</path>", x - r - 1, y - 2,
                         2 * (r + 1), 4, 2 * (r + 1), title);
  }
}

std::string Axes(const Chart& chart, const Scale& scale) {
  std::string svg;
  for (int i = 0; i <= kYSteps; ++i) {
    const double value = scale.low() + (scale.high() - scale.low()) * i / kYSteps;
    const double y = scale.Y(value);
    svg += fmt::format(
        "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>"
        "<text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>",
        kLeft, kWidth - kRight, y, y, kLeft - 7, y + 4, scale.YText(value));
  }
  const size_t every = (scale.xs().size() + kMostLabels - 1) / kMostLabels;
  size_t index = 0;
  for (const double x : scale.xs()) {
    if (index++ % every != 0) continue;
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{:.0f}</text>",
                       scale.X(x), kHeight - kBottom + 18, x);
  }
  svg += fmt::format("<text class=\"axis\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                     (kLeft + kWidth - kRight) / 2, kHeight - 6, HtmlText(chart.x_label));
  svg += fmt::format(
      "<text class=\"axis\" transform=\"translate(13 {}) rotate(-90)\" "
      "text-anchor=\"middle\">{}</text>",
      (kTop + kHeight - kBottom) / 2, HtmlText(chart.y_label));
  return svg;
}

std::string Line(const Chart& chart, const Scale& scale, const ChartSeries& series) {
  std::string line, markers;
  for (const ChartPoint& point : series.points) {
    const double x = scale.X(point.x), y = scale.Y(point.y);
    line += fmt::format("{}{:.1f} {:.1f}", line.empty() ? "M" : "L", x, y);
    const std::string where =
        point.x_text.empty() ? fmt::format("{} {:.0f}", chart.x_label, point.x) : point.x_text;
    const std::string value =
        chart.percent ? fmt::format("{:.1f} %", 100 * point.y) : fmt::format("{:.4f}", point.y);
    markers += Marker(x, y, series.look, fmt::format("{}, {}: {}", series.name, where, value));
  }
  return fmt::format("<g class=\"s{}\"><path class=\"line\" d=\"{}\"/>{}</g>",
                     series.look % kChartLooks, line, markers);
}

}  // namespace

std::string ChartHtml(const Chart& chart) {
  const Scale scale(chart);
  std::string html = fmt::format("<figure><figcaption>{}</figcaption>\n", HtmlText(chart.title));
  if (scale.xs().empty()) return html + "<p>Nothing was measured.</p></figure>\n";
  html += fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">", kWidth, kHeight,
                      HtmlText(chart.title));
  html += Axes(chart, scale);
  for (const ChartSeries& series : chart.series) html += Line(chart, scale, series);
  html += "</svg>\n<ul class=\"legend\">";
  for (const ChartSeries& series : chart.series) {
    html += fmt::format(
        "<li class=\"s{}\"><svg viewBox=\"0 0 16 16\" aria-hidden=\"true\">{}</svg>{}"
        "</li>",
        series.look % kChartLooks, Marker(8, 8, series.look, series.name), HtmlText(series.name));
  }
  return html + "</ul></figure>\n";
}

std::string HtmlText(const std::string& text) {
  const std::string valid = ValidUtf8(text);
  std::string escaped;
  for (const char c : valid) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') {
          escaped += "\xef\xbf\xbd";
        } else {
          escaped += c;
        }
    }
  }
  return escaped;
}

}  // namespace clusterkv::client::replay
