#include "client/bench/ceilings.h"

#include <gtest/gtest.h>

namespace clusterkv::client::bench {
namespace {

constexpr Ceilings kCeilings = {
    .device_copy = 3e12, .to_device = 50e9, .to_host = 25e9, .flops = 1e15};

TEST(Floor, IsTheSlowestOfWhatMustHappen) {
  const Floor copied = FloorOf({.device_bytes = 3e6, .flops = 1e8}, kCeilings);
  EXPECT_EQ(copied.ceiling, "hbm-copy");
  EXPECT_DOUBLE_EQ(copied.microseconds, 1.0);
  EXPECT_EQ(copied.bytes, 3e6);
  const Floor fetched = FloorOf({.device_bytes = 3e6, .to_device_bytes = 5e6}, kCeilings);
  EXPECT_EQ(fetched.ceiling, "h2d");
  EXPECT_DOUBLE_EQ(fetched.microseconds, 100.0);
  EXPECT_EQ(fetched.bytes, 5e6);
  EXPECT_EQ(FloorOf({.device_bytes = 3e6, .to_host_bytes = 5e6}, kCeilings).ceiling, "d2h");
  const Floor computed = FloorOf({.device_bytes = 3e6, .flops = 1e12}, kCeilings);
  EXPECT_EQ(computed.ceiling, "flops");
  EXPECT_DOUBLE_EQ(computed.microseconds, 1000.0);
  EXPECT_EQ(computed.bytes, 3e6);
}

TEST(Floor, LeavesOutWhatWasNotMeasured) {
  const Floor floor = FloorOf({.device_bytes = 3e6, .flops = 1e12}, {.device_copy = 3e12});
  EXPECT_EQ(floor.ceiling, "hbm-copy");
  const Floor none = FloorOf({.flops = 1e12}, {});
  EXPECT_EQ(none.ceiling, "none");
  EXPECT_EQ(none.microseconds, 0.0);
}

}  // namespace
}  // namespace clusterkv::client::bench
