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

TEST(BackendRegistry, HostHasNoLegacyHandles) {
  const auto refused = CreateDevice({.backend = "host", .gpu_sharing = GpuSharing::kLegacy});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(refused.status().message().find("gpu-sharing is legacy"), absl::string_view::npos);
  EXPECT_TRUE(CreateDevice({.backend = "host", .gpu_sharing = GpuSharing::kVmm}).ok());
  // Nor does auto take a backend that would ignore it.
  const auto automatic = CreateDevice({.backend = "auto", .gpu_sharing = GpuSharing::kLegacy});
  if (!automatic.ok()) {
    EXPECT_EQ(automatic.status().code(), absl::StatusCode::kInvalidArgument);
  } else {
    EXPECT_EQ((*automatic)->backend(), "cuda");
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
