#include "client/bench/statistics.h"

#include <gtest/gtest.h>

#include <numeric>

namespace clusterkv::client::bench {
namespace {

TEST(Summary, OfOneSampleIsThatSample) {
  const Summary summary = Summarize({3.5});
  EXPECT_EQ(summary.median, 3.5);
  EXPECT_EQ(summary.p99, 3.5);
  EXPECT_EQ(summary.best, 3.5);
}

TEST(Summary, TakesTheMeanOfTheMiddleTwo) {
  EXPECT_EQ(Summarize({9.0, 1.0, 4.0}).median, 4.0);
  EXPECT_EQ(Summarize({9.0, 1.0, 4.0, 2.0}).median, 3.0);
}

TEST(Summary, HasTheNearestRankAsP99) {
  std::vector<double> samples(100);
  std::iota(samples.begin(), samples.end(), 1.0);
  EXPECT_EQ(Summarize(samples).p99, 99.0);
  samples.push_back(1000.0);
  EXPECT_EQ(Summarize(samples).p99, 100.0);
  EXPECT_EQ(Summarize({1.0, 2.0, 50.0}).p99, 50.0);
}

}  // namespace
}  // namespace clusterkv::client::bench
