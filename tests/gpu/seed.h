// Seeds of randomised tests: fixed by default, CLUSTERKV_TEST_SEED tries another; printed on
// failure.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

namespace clusterkv::gpu {

inline uint64_t TestSeed() {
  const char* const text = std::getenv("CLUSTERKV_TEST_SEED");
  return text == nullptr ? 20'250'413 : std::strtoull(text, nullptr, 10);
}

inline std::string SeedTrace(uint64_t seed) {
  return "CLUSTERKV_TEST_SEED=" + std::to_string(seed);
}

}  // namespace clusterkv::gpu
