#include "gpu/cluster_worth.h"

#include <gtest/gtest.h>

#include <limits>

namespace clusterkv::gpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(ClusterWorth, MeanScoreFollowsTheLastTenStepsOrSo) {
  float mean = NextMeanScore(0.0f, 1.0f);
  EXPECT_FLOAT_EQ(mean, 0.2f);
  for (int step = 0; step < 30; ++step) mean = NextMeanScore(mean, 1.0f);
  EXPECT_GT(mean, 0.99f);
  for (int step = 0; step < 10; ++step) mean = NextMeanScore(mean, 0.0f);
  EXPECT_NEAR(mean, 0.107, 0.001);
}

TEST(ClusterWorth, MeanScoreStartsAnewBehindWhatIsNotFinite) {
  for (float score : {kNan, kInfinity, -kInfinity}) {
    EXPECT_EQ(NextMeanScore(0.5f, score), 0.0f);
    EXPECT_EQ(NextMeanScore(score, 0.5f), 0.0f);
  }
  EXPECT_EQ(NextMeanScore(-3e38f, 3e38f), 0.0f);
}

TEST(ClusterWorth, SharesCountByTheRootOfTheTokens) {
  EXPECT_FLOAT_EQ(ClusterWorth(GroupRule::kSoftmax, 0.3f, 1), 0.3f);
  EXPECT_FLOAT_EQ(ClusterWorth(GroupRule::kSoftmax, 0.3f, 9), 0.1f);
}

TEST(ClusterWorth, LogitsOrderAsTheirExponentialsDo) {
  for (GroupRule rule : {GroupRule::kMean, GroupRule::kMax}) {
    for (float logit : {-7.0f, 0.0f, 2.5f}) {
      EXPECT_FLOAT_EQ(std::exp(ClusterWorth(rule, logit, 16)), std::exp(logit) / 4.0f);
    }
  }
}

}  // namespace
}  // namespace clusterkv::gpu
