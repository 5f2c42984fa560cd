#include "gpu/host/score_order.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

namespace clusterkv::gpu::host {
namespace {

TEST(ScoreOrder, RisesWithTheScore) {
  using Limits = std::numeric_limits<float>;
  const std::vector<float> rising = {-Limits::infinity(),
                                     Limits::lowest(),
                                     -1.0f,
                                     -Limits::denorm_min(),
                                     0.0f,
                                     Limits::denorm_min(),
                                     1.0f,
                                     Limits::max(),
                                     Limits::infinity()};
  for (size_t i = 1; i < rising.size(); ++i) {
    EXPECT_LT(OrderedBits(rising[i - 1]), OrderedBits(rising[i])) << i;
  }
  EXPECT_EQ(OrderedBits(-0.0f), OrderedBits(0.0f));
  EXPECT_LT(OrderedBits(Limits::quiet_NaN()), OrderedBits(-Limits::infinity()));
  EXPECT_LT(OrderedBits(-Limits::quiet_NaN()), OrderedBits(-Limits::infinity()));
}

}  // namespace
}  // namespace clusterkv::gpu::host
