// The suite that every backend's operations must pass; a backend instantiates it with its name.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <tuple>

#include "gpu/device.h"
#include "gpu/dtype.h"

namespace clusterkv::gpu {

// Behaviour, at one shape. The parameter is DeviceOptions::backend.
class OpsConformance : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override;

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

// Numbers, over the shapes: backend, head_dim, group size, dtype.
class OpsShapes : public testing::TestWithParam<std::tuple<std::string, int, int, DType>> {};

}  // namespace clusterkv::gpu
