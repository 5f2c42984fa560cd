#include "service/size_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace clusterkv::service {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(ParseSize, UnderstandsUnitsAsPowersOf1024) {
  EXPECT_EQ(*ParseSize("0"), 0u);
  EXPECT_EQ(*ParseSize("4096"), 4096u);
  EXPECT_EQ(*ParseSize("64b"), 64u);
  EXPECT_EQ(*ParseSize("3k"), 3u << 10);
  EXPECT_EQ(*ParseSize("64mb"), 64ull << 20);
  EXPECT_EQ(*ParseSize("64 MiB"), 64ull << 20);
  EXPECT_EQ(*ParseSize("30gb"), 30ull << 30);
  EXPECT_EQ(*ParseSize("1.5GiB"), 3ull << 29);
  EXPECT_EQ(*ParseSize("2tb"), 2ull << 40);
}

TEST(ParseSize, RefusesWhatIsNoSizeAndSaysWhatIs) {
  for (const char* text : {"",          "gb",   "-1",  "-1gb", "1 0gb",  "10x", "10 gb b",
                           "1.2.3gb",   "0.3b", "1e3", "0x10", "nan",    "inf", "9999999tb",
                           "8388608tb", ".",    "1ib", "1bib", "10 g b", "+5",  "５gb"}) {
    const auto size = ParseSize(text);
    ASSERT_FALSE(size.ok()) << text << " became " << *size;
    EXPECT_EQ(size.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(size.status().message()), HasSubstr("kb, mb, gb or tb")) << text;
  }
}

TEST(ParseSize, KeepsEveryByteOfPlainNumbers) {
  EXPECT_EQ(*ParseSize("9007199254740993"), 9007199254740993u);
  EXPECT_EQ(*ParseSize("9223372036854775807"), 9223372036854775807u);
  EXPECT_FALSE(ParseSize("9223372036854775808").ok());
}

TEST(SizeText, PicksTheLargestUnitThatDivides) {
  EXPECT_EQ(SizeText(0), "0");
  EXPECT_EQ(SizeText(1), "1b");
  EXPECT_EQ(SizeText(4097), "4097b");
  EXPECT_EQ(SizeText(64ull << 20), "64mb");
  EXPECT_EQ(SizeText(1536ull << 20), "1536mb");
  EXPECT_EQ(SizeText(3ull << 40), "3tb");
}

TEST(SizeText, IsReadBackAsItself) {
  for (const uint64_t bytes : {1ull, 1023ull, 1ull << 10, 5ull << 30, (1ull << 53) + 1}) {
    EXPECT_EQ(*ParseSize(SizeText(bytes)), bytes);
  }
}

TEST(ParseDuration, WantsAUnitAndNoSign) {
  EXPECT_EQ(*ParseDuration("10s"), absl::Seconds(10));
  EXPECT_EQ(*ParseDuration("500ms"), absl::Milliseconds(500));
  EXPECT_EQ(*ParseDuration("1m30s"), absl::Seconds(90));
  EXPECT_EQ(*ParseDuration("0"), absl::ZeroDuration());
  for (const char* text : {"", "10", "-1s", "inf", "ten", "1 s", "10sec"}) {
    EXPECT_FALSE(ParseDuration(text).ok()) << text;
  }
}

TEST(ParseIdList, SplitsAtCommas) {
  EXPECT_THAT(*ParseIdList("1000,0,1000"), ElementsAre(0u, 1000u));
  EXPECT_THAT(*ParseIdList(""), IsEmpty());
  EXPECT_THAT(*ParseIdList("4294967295"), ElementsAre(4294967295u));
  for (const char* text : {"root", "1;2", "-1", "4294967296", "1,,x"}) {
    EXPECT_FALSE(ParseIdList(text).ok()) << text;
  }
}

}  // namespace
}  // namespace clusterkv::service
