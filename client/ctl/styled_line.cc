#include "client/ctl/styled_line.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "client/ctl/terminal_text.h"

namespace clusterkv::client::ctl {
namespace {

const char* Escape(Style style) {
  switch (style) {
    case Style::kPlain:
      return "";
    case Style::kBold:
      return "\x1b[1m";
    case Style::kQuiet:
      return "\x1b[2m";
    case Style::kGood:
      return "\x1b[32m";
    case Style::kWarning:
      return "\x1b[33m";
    case Style::kBad:
      return "\x1b[31m";
  }
  return "";
}

}  // namespace

bool StdoutIsScreen() {
  const char* const terminal = std::getenv("TERM");
  return isatty(STDOUT_FILENO) == 1 && terminal != nullptr && std::strcmp(terminal, "dumb") != 0;
}

bool StdoutWantsColour() {
  const char* const no_colour = std::getenv("NO_COLOR");
  return StdoutIsScreen() && (no_colour == nullptr || *no_colour == '\0');
}

StyledLine& StyledLine::Add(const std::string& text, Style style) {
  pieces_.push_back({text, style});
  return *this;
}

std::string StyledLine::Render(size_t columns, bool colour) const {
  std::string rendered;
  for (const Piece& piece : pieces_) {
    const std::string text = FirstColumns(piece.text, columns);
    columns -= Columns(text);
    const bool escaped = colour && piece.style != Style::kPlain && !text.empty();
    rendered += escaped ? Escape(piece.style) + text + "\x1b[0m" : text;
  }
  return rendered;
}

}  // namespace clusterkv::client::ctl
