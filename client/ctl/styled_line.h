// A line of a terminal, in pieces of one look each.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace clusterkv::client::ctl {

enum class Style { kPlain, kBold, kQuiet, kGood, kWarning, kBad };

// stdout is a terminal that can do more than write line after line.
bool StdoutIsScreen();
// It is, and nobody asked for no colour (NO_COLOR, https://no-color.org).
bool StdoutWantsColour();

class StyledLine {
 public:
  StyledLine() = default;
  explicit StyledLine(const std::string& text, Style style = Style::kPlain) { Add(text, style); }
  // `text` is printable.
  StyledLine& Add(const std::string& text, Style style = Style::kPlain);

  // At most `columns` wide; colours by escape sequences, or none.
  std::string Render(size_t columns, bool colour) const;

 private:
  struct Piece {
    std::string text;
    Style style;
  };
  std::vector<Piece> pieces_;
};

}  // namespace clusterkv::client::ctl
