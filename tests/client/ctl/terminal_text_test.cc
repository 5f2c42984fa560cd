#include "client/ctl/terminal_text.h"

#include <gtest/gtest.h>

#include "client/ctl/styled_line.h"

namespace clusterkv::client::ctl {
namespace {

TEST(Printable, KeepsTextAndReplacesWhatMovesTheCursor) {
  EXPECT_EQ(Printable("llama-70b/rank 0, \xc3\xa4\xe2\x82\xac"),
            "llama-70b/rank 0, \xc3\xa4\xe2\x82\xac");
  EXPECT_EQ(Printable("a\x1b[2J\nb\tc\r\x7f"), "a?[2J?b?c??");
  EXPECT_EQ(Printable("csi \xc2\x9b"
                      "2J"),
            "csi ?2J");  // U+009B is a control sequence too
  EXPECT_EQ(Printable("\xff\xc3"), "??");
  EXPECT_EQ(Printable(std::string("a\0b", 3)), "a?b");
}

TEST(Columns, CountCharacters) {
  EXPECT_EQ(Columns("a\xc3\xa4\xe2\x82\xac"), 3u);
  EXPECT_EQ(FirstColumns("a\xc3\xa4\xe2\x82\xac", 2), "a\xc3\xa4");
  EXPECT_EQ(FirstColumns("abc", 0), "");
  EXPECT_EQ(FirstColumns("abc", 9), "abc");
}

TEST(Table, AlignsByCharactersAndBreaksNoLine) {
  EXPECT_EQ(
      Table({{"NAME", "N"}, {"\xc3\xa4\xc3\xa4\xc3\xa4\xc3\xa4\xc3\xa4", "1"}, {"x\ny", "2"}}),
      "NAME   N\n\xc3\xa4\xc3\xa4\xc3\xa4\xc3\xa4\xc3\xa4  1\nx?y    2\n");
}

TEST(Amounts, HaveUnits) {
  EXPECT_EQ(BytesText(0), "0 B");
  EXPECT_EQ(BytesText(1023), "1023 B");
  EXPECT_EQ(BytesText(1536), "1.5 KiB");
  EXPECT_EQ(BytesText(static_cast<double>(uint64_t{3} << 50)), "3072.0 TiB");
  EXPECT_EQ(CountText(999), "999");
  EXPECT_EQ(CountText(12'345), "12.3 k");
}

TEST(StyledLine, IsCutToTheTerminalWithoutItsColours) {
  StyledLine line("abc", Style::kGood);
  line.Add("def");
  EXPECT_EQ(line.Render(80, false), "abcdef");
  EXPECT_EQ(line.Render(80, true), "\x1b[32mabc\x1b[0mdef");
  EXPECT_EQ(line.Render(2, true), "\x1b[32mab\x1b[0m");
  EXPECT_EQ(line.Render(4, false), "abcd");
}

}  // namespace
}  // namespace clusterkv::client::ctl
