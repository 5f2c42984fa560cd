#include "service/log_limiter.h"

#include <gtest/gtest.h>

namespace clusterkv::service {
namespace {

const absl::Time kStart = absl::FromUnixSeconds(1'700'000'000);

TEST(LogLimiter, AdmitsABurstThenOneEachInterval) {
  LogLimiter limiter(3, absl::Seconds(2));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(limiter.Admit(kStart), 0u);
  EXPECT_EQ(limiter.Admit(kStart), std::nullopt);
  EXPECT_EQ(limiter.Admit(kStart + absl::Seconds(1)), std::nullopt);
  EXPECT_EQ(limiter.Admit(kStart + absl::Seconds(2)), 2u);  // tells what was left out
  EXPECT_EQ(limiter.Admit(kStart + absl::Seconds(2)), std::nullopt);
  EXPECT_EQ(limiter.Admit(kStart + absl::Seconds(4)), 1u);
}

TEST(LogLimiter, FillsToTheBurstAndNoFurther) {
  LogLimiter limiter(2, absl::Seconds(1));
  EXPECT_EQ(limiter.Admit(kStart), 0u);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(limiter.Admit(kStart + absl::Hours(1)), 0u);
  EXPECT_EQ(limiter.Admit(kStart + absl::Hours(1)), std::nullopt);
}

TEST(LogLimiter, AClockThatIsSetBackGivesNothingAndBreaksNothing) {
  LogLimiter limiter(1, absl::Seconds(1));
  EXPECT_EQ(limiter.Admit(kStart), 0u);
  EXPECT_EQ(limiter.Admit(kStart - absl::Hours(1)), std::nullopt);
  EXPECT_EQ(limiter.Admit(kStart - absl::Hours(1) + absl::Seconds(1)), 1u);
}

}  // namespace
}  // namespace clusterkv::service
