#include "client/ctl/terminal_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "client/valid_utf8.h"

namespace clusterkv::client::ctl {
namespace {

bool IsContinuation(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

std::string Scaled(double value, double step, const std::array<const char*, 5>& units) {
  size_t unit = 0;
  while (value >= step && unit + 1 < units.size()) {
    value /= step;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f}{}", value, units[0])
                   : fmt::format("{:.1f}{}", value, units[unit]);
}

}  // namespace

std::string Printable(const std::string& text) {
  const std::string valid = ValidUtf8(text);
  std::string printable;
  for (size_t i = 0; i < valid.size(); ++i) {
    const auto byte = static_cast<unsigned char>(valid[i]);
    const auto next = static_cast<unsigned char>(i + 1 < valid.size() ? valid[i + 1] : 0);
    const bool second_control = byte == 0xc2 && next >= 0x80 && next < 0xa0;  // U+0080 to U+009F
    if (byte < 0x20 || byte == 0x7f || second_control) {
      printable += '?';
      i += second_control ? 1 : 0;
    } else if (valid.compare(i, 3, "\xef\xbf\xbd") == 0) {
      printable += '?';
      i += 2;
    } else {
      printable += valid[i];
    }
  }
  return printable;
}

size_t Columns(const std::string& text) {
  return static_cast<size_t>(
      std::ranges::count_if(text, [](char c) { return !IsContinuation(c); }));
}

std::string FirstColumns(const std::string& text, size_t columns) {
  size_t end = 0;
  for (size_t taken = 0; end < text.size(); ++end) {
    if (!IsContinuation(text[end]) && taken++ == columns) break;
  }
  return text.substr(0, end);
}

std::string Table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::vector<std::string>> cells = rows;
  std::vector<size_t> widths(rows.front().size());
  for (auto& row : cells) {
    for (size_t i = 0; i < row.size(); ++i) {
      row[i] = Printable(row[i]);
      widths[i] = std::max(widths[i], Columns(row[i]));
    }
  }
  std::string text;
  for (const auto& row : cells) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += row[i] + std::string(widths[i] - Columns(row[i]) + 2, ' ');
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string BytesText(double bytes) {
  return Scaled(bytes, 1024, {" B", " KiB", " MiB", " GiB", " TiB"});
}

std::string CountText(double count) { return Scaled(count, 1000, {"", " k", " M", " G", " T"}); }

}  // namespace clusterkv::client::ctl
