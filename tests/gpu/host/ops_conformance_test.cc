#include "tests/gpu/ops_conformance.h"

namespace clusterkv::gpu {
namespace {

INSTANTIATE_TEST_SUITE_P(Host, OpsConformance, testing::Values("host"));

INSTANTIATE_TEST_SUITE_P(
    Host, OpsShapes,
    testing::Combine(testing::Values("host"), testing::Values(64, 96, 128, 256),
                     testing::Values(1, 3, 4, 16),
                     testing::Values(DType::kBf16, DType::kFp16, DType::kFp32)),
    [](const auto& info) {
      return std::to_string(std::get<1>(info.param)) + "x" +
             std::to_string(std::get<2>(info.param)) + DTypeName(std::get<3>(info.param));
    });

}  // namespace
}  // namespace clusterkv::gpu
