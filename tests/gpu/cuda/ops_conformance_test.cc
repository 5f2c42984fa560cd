#include "tests/gpu/ops_conformance.h"

namespace clusterkv::gpu {
namespace {

INSTANTIATE_TEST_SUITE_P(Cuda, OpsConformance, testing::Values("cuda"));

INSTANTIATE_TEST_SUITE_P(Cuda, OpsShapes,
                         testing::Combine(testing::Values("cuda"),
                                          testing::Values(64, 96, 128, 256),
                                          testing::Values(1, 3, 4, 16),
                                          testing::Values(DType::kBf16, DType::kFp16)),
                         [](const auto& info) {
                           return std::to_string(std::get<1>(info.param)) + "x" +
                                  std::to_string(std::get<2>(info.param)) +
                                  DTypeName(std::get<3>(info.param));
                         });

}  // namespace
}  // namespace clusterkv::gpu
