#include <gtest/gtest.h>

#include "gpu/device.h"

namespace clusterkv::gpu {
namespace {

TEST(BackendRegistry, HostIsAlwaysThere) {
  const auto device = CreateDevice({.backend = "host", .threads = 2});
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_EQ((*device)->backend(), "host");
  EXPECT_NE((*device)->description().find("2 threads"), std::string::npos);
}

TEST(BackendRegistry, AutoTakesWhatIsThere) {
  const auto device = CreateDevice({});
  ASSERT_TRUE(device.ok()) << device.status();
}

TEST(BackendRegistry, CudaNeverBecomesHost) {
  const auto device = CreateDevice({.backend = "cuda", .threads = 0});
  if (device.ok()) {
    EXPECT_EQ((*device)->backend(), "cuda");
  } else {
    EXPECT_EQ(device.status().code(), absl::StatusCode::kUnavailable) << device.status();
  }
}

TEST(BackendRegistry, UnknownBackendAndThreadsAreRefused) {
  EXPECT_EQ(CreateDevice({.backend = "opencl", .threads = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  for (int threads : {-1, 1025}) {
    EXPECT_EQ(CreateDevice({.backend = "host", .threads = threads}).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace clusterkv::gpu
