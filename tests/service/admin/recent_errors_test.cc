#include "service/recent_errors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

namespace clusterkv::service {
namespace {

using testing::ElementsAre;

std::vector<std::string> Texts(const RecentErrors& errors) {
  std::vector<std::string> texts;
  for (const RecentError& error : errors.List()) texts.push_back(error.text);
  return texts;
}

// Each of a message of its own.
void Add(RecentErrors& errors, const std::string& text) { errors.Add("now", "error", text, text); }

TEST(RecentErrors, AreTheNewestOldestFirst) {
  RecentErrors errors;
  for (int i = 0; i < 53; ++i) Add(errors, "error " + std::to_string(i));
  const auto list = errors.List();
  ASSERT_EQ(list.size(), RecentErrors::kCapacity);
  EXPECT_EQ(list.front().text, "error 3");
  EXPECT_EQ(list.back().text, "error 52");
}

TEST(RecentErrors, OneThatRepeatsPushesNoneOut) {
  RecentErrors errors;
  errors.Add("1", "error", "m", "rare");
  for (int i = 0; i < 100; ++i) errors.Add("2", "warning", "m", "common");
  errors.Add("3", "error", "m", "common");  // of another level
  EXPECT_THAT(Texts(errors), ElementsAre("rare", "common", "common"));
  EXPECT_EQ(errors.List()[1].count, 100u);
  EXPECT_EQ(errors.List()[2].count, 1u);
  errors.Add("4", "error", "m", "rare");
  EXPECT_EQ(errors.List().back().text, "rare");
  EXPECT_EQ(errors.List().back().time, "4");
  EXPECT_EQ(errors.List().back().count, 2u);
}

TEST(RecentErrors, OfOneMessageOnlyTheNewestStay) {
  RecentErrors errors;
  Add(errors, "rare");
  for (int i = 0; i < 100; ++i)
    errors.Add("now", "warning", "slow", "slow ms=" + std::to_string(i));
  const auto list = errors.List();
  ASSERT_EQ(list.size(), 1 + RecentErrors::kMaxOfOneMessage);
  EXPECT_EQ(list[0].text, "rare");
  EXPECT_EQ(list[1].text, "slow ms=90");
  EXPECT_EQ(list.back().text, "slow ms=99");
}

TEST(RecentErrors, ALongTextIsCutAndBadBytesAreReplaced) {
  RecentErrors errors;
  Add(errors, std::string(5000, 'x'));
  // The cut goes through a character.
  Add(errors, std::string(RecentErrors::kMaxTextBytes - 1, 'y') + "\xc3\xa4 more");
  Add(errors, "\xff");
  EXPECT_THAT(Texts(errors),
              ElementsAre(std::string(RecentErrors::kMaxTextBytes, 'x') + " ...",
                          std::string(RecentErrors::kMaxTextBytes - 1, 'y') + "\xef\xbf\xbd ...",
                          "\xef\xbf\xbd"));
}

TEST(RecentErrors, TakeThemFromManyThreads) {
  RecentErrors errors;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        Add(errors, std::to_string(i % 40));
        EXPECT_LE(errors.List().size(), 40u);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  uint64_t count = 0;
  for (const RecentError& error : errors.List()) count += error.count;
  EXPECT_EQ(count, 800u);
}

}  // namespace
}  // namespace clusterkv::service
