// Text for a terminal: tables, amounts, and names that others chose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace clusterkv::client::ctl {

// Control characters and bytes that are no UTF-8 become '?': a name must not move the cursor,
// change colours, or break a line.
std::string Printable(const std::string& text);

// Columns that Printable text takes: its characters, each counted as one.
size_t Columns(const std::string& text);
// At most `columns` of them, from the start.
std::string FirstColumns(const std::string& text, size_t columns);

// Columns as wide as their widest cell; the first row is the heading. Cells are made printable.
std::string Table(const std::vector<std::vector<std::string>>& rows);

// "12.5 MiB"
std::string BytesText(double bytes);
// "850", "12.3 k", "4.5 M"
std::string CountText(double count);

}  // namespace clusterkv::client::ctl
