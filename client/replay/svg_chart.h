// Lines over a logarithmic axis, as inline SVG that needs no script. Colours are the page's:
// classes s0 to s5 of the series, and grid, axis.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace clusterkv::client::replay {

struct ChartPoint {
  double x = 0.0;  // above 0
  double y = 0.0;
  std::string x_text;  // empty: the number; for the tooltip
};

struct ChartSeries {
  std::string name;
  size_t look = 0;                 // colour and marker, 0 to 5
  std::vector<ChartPoint> points;  // in rising x
};

struct Chart {
  std::string title;
  std::string x_label;
  std::string y_label;
  std::vector<ChartSeries> series;
  bool percent = false;   // y from 0 to 1, written as percent
  bool from_zero = true;  // else the axis begins below the least value
  bool linear_x = false;  // x is a whole number at even distances
};

constexpr size_t kChartLooks = 6;

// <figure> with the SVG and its legend. A point's value is its tooltip.
std::string ChartHtml(const Chart& chart);

// Text where HTML expects text, or a value in double quotes. Bytes that are no UTF-8, and control
// characters, become U+FFFD.
std::string HtmlText(const std::string& text);

}  // namespace clusterkv::client::replay
