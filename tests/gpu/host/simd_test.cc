#include "gpu/host/simd.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/gpu/half_format.h"
#include "tests/gpu/seed.h"

namespace clusterkv::gpu::host {
namespace {

// Every instruction set that this machine has, one at a time.
class Simd : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};

INSTANTIATE_TEST_SUITE_P(Targets, Simd, testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& info) {
                           return std::string(hwy::TargetName(info.param));
                         });

void ExpectSame(float actual, double expected, uint32_t bits) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(actual)) << std::hex << bits;
  } else {
    EXPECT_EQ(std::bit_cast<uint32_t>(actual),
              std::bit_cast<uint32_t>(static_cast<float>(expected)))
        << std::hex << bits;
  }
}

TEST_P(Simd, WidensAllHalves) {
  std::vector<uint16_t> all(65'536);
  for (uint32_t i = 0; i < 65'536; ++i) all[i] = static_cast<uint16_t>(i);
  for (DType dtype : {DType::kBf16, DType::kFp16}) {
    const HalfFormat format(dtype);
    std::vector<float> floats(all.size());
    ToFloat(dtype, all.data(), floats.data(), all.size());
    for (uint32_t i = 0; i < 65'536; ++i) ExpectSame(floats[i], format.Decode(all[i]), i);
    // One at a time takes the path of last elements.
    for (uint32_t i = 0; i < 65'536; ++i) {
      float single = 0.0f;
      ToFloat(dtype, &all[i], &single, 1);
      ExpectSame(single, format.Decode(all[i]), i);
    }
  }
}

// Each finite half, the midpoint to the next, and the floats beside that midpoint.
std::vector<float> RoundingCases(DType dtype) {
  const HalfFormat format(dtype);
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> values = {infinity,
                               -infinity,
                               65'519.996f,
                               65'520.0f,
                               1e30f,
                               std::numeric_limits<float>::max(),
                               std::numeric_limits<float>::denorm_min()};
  for (uint32_t i = 0; i < 0x8000; ++i) {
    const double value = format.Decode(static_cast<uint16_t>(i));
    const double next = format.Decode(static_cast<uint16_t>(i + 1));
    if (!std::isfinite(value) || !std::isfinite(next)) continue;
    const auto middle = static_cast<float>((value + next) / 2);
    for (float v : {static_cast<float>(value), middle, std::nextafter(middle, infinity),
                    std::nextafter(middle, -infinity)}) {
      values.push_back(v);
      values.push_back(-v);
    }
  }
  return values;
}

TEST_P(Simd, NarrowsToTheNearestEvenHalf) {
  for (DType dtype : {DType::kBf16, DType::kFp16}) {
    const HalfFormat format(dtype);
    const std::vector<float> values = RoundingCases(dtype);
    std::vector<uint16_t> halves(values.size());
    FromFloat(dtype, values.data(), halves.data(), values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      ASSERT_EQ(halves[i], format.Encode(values[i])) << DTypeName(dtype) << " of " << values[i];
      uint16_t single = 0;
      FromFloat(dtype, &values[i], &single, 1);
      ASSERT_EQ(single, format.Encode(values[i])) << DTypeName(dtype) << " of " << values[i];
    }
  }
}

TEST_P(Simd, NarrowsNanToNan) {
  // Payloads that a careless rounding carries into infinity or zero.
  std::vector<float> nans;
  for (uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fffffffu, 0xff800001u, 0xffffffffu,
                        0x7fc00000u, 0x7f801fffu, 0x7fffe000u}) {
    for (int copy = 0; copy < 8; ++copy) nans.push_back(std::bit_cast<float>(bits));
  }
  for (DType dtype : {DType::kBf16, DType::kFp16}) {
    std::vector<uint16_t> halves(nans.size());
    FromFloat(dtype, nans.data(), halves.data(), nans.size());
    for (uint16_t half : halves) EXPECT_TRUE(std::isnan(HalfFormat(dtype).Decode(half))) << half;
    FromFloat(dtype, nans.data(), halves.data(), 1);
    EXPECT_TRUE(std::isnan(HalfFormat(dtype).Decode(halves[0])));
  }
}

// Rows of random values in storage, with odd lengths and odd addresses.
class Rows {
 public:
  Rows(DType dtype, size_t count, size_t n, std::mt19937_64& random)
      : stride_(n * SizeOf(dtype) + 3), bytes_(count * stride_ + 1), values_(count * n), n_(n) {
    std::normal_distribution<double> normal;
    for (size_t r = 0; r < count; ++r) {
      for (size_t i = 0; i < n; ++i) {
        const auto value = static_cast<float>(normal(random));
        if (dtype == DType::kFp32) {
          std::memcpy(row(r) + 4 * i, &value, 4);
          values_[r * n + i] = value;
        } else {
          const uint16_t half = HalfFormat(dtype).Encode(value);
          std::memcpy(row(r) + 2 * i, &half, 2);
          values_[r * n + i] = HalfFormat(dtype).Decode(half);
        }
      }
    }
  }

  std::byte* row(size_t r) { return bytes_.data() + 1 + r * stride_; }
  double value(size_t r, size_t i) const { return values_[r * n_ + i]; }
  size_t stride() const { return stride_; }

 private:
  const size_t stride_;
  std::vector<std::byte> bytes_;
  std::vector<double> values_;
  const size_t n_;
};

std::vector<float> RandomFloats(size_t n, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(random);
  return values;
}

TEST_P(Simd, DotRowsEqualsTheSumOfProducts) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (size_t n : {1, 7, 64, 96, 101, 256}) {
      for (size_t count : {1, 3, 8, 19}) {
        Rows rows(dtype, count, n, random);
        const std::vector<float> vector = RandomFloats(n, random);
        std::vector<float> dots(count);
        DotRows(dtype, vector.data(), rows.row(0), rows.stride(), count, n, dots.data());
        for (size_t r = 0; r < count; ++r) {
          double expected = 0.0;
          for (size_t i = 0; i < n; ++i) expected += rows.value(r, i) * vector[i];
          ASSERT_NEAR(dots[r], expected, 1e-5 * std::sqrt(static_cast<double>(n)));
        }
      }
    }
  }
}

TEST_P(Simd, DotGroupAndAddWeightedRowsAgreeWithDouble) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (size_t group : {1, 2, 3, 4, 7, 16}) {
      const size_t n = group % 2 == 0 ? 96 : 75;
      constexpr size_t kCount = 21;
      constexpr size_t kStride = 24;
      Rows rows(dtype, kCount, n, random);
      std::vector<const std::byte*> pointers(kCount);
      for (size_t r = 0; r < kCount; ++r) pointers[r] = rows.row(kCount - 1 - r);
      const std::vector<float> vectors = RandomFloats(group * n, random);
      std::vector<float> dots(group * kStride, -7.0f);
      DotGroup(dtype, vectors.data(), group, pointers.data(), kCount, n, dots.data(), kStride);
      std::vector<float> accumulators = RandomFloats(group * n, random);
      const std::vector<float> before = accumulators;
      AddWeightedRows(dtype, dots.data(), kStride, group, pointers.data(), kCount, n,
                      accumulators.data());
      for (size_t g = 0; g < group; ++g) {
        std::vector<double> expected(before.begin() + static_cast<ptrdiff_t>(g * n),
                                     before.begin() + static_cast<ptrdiff_t>((g + 1) * n));
        for (size_t r = 0; r < kCount; ++r) {
          double dot = 0.0;
          for (size_t i = 0; i < n; ++i) {
            dot += rows.value(kCount - 1 - r, i) * vectors[g * n + i];
          }
          ASSERT_NEAR(dots[g * kStride + r], dot, 1e-4);
          for (size_t i = 0; i < n; ++i) expected[i] += dot * rows.value(kCount - 1 - r, i);
        }
        for (size_t r = kCount; r < kStride; ++r) ASSERT_EQ(dots[g * kStride + r], -7.0f);
        for (size_t i = 0; i < n; ++i) ASSERT_NEAR(accumulators[g * n + i], expected[i], 2e-3);
      }
    }
  }
}

TEST_P(Simd, AddScaledAndDotAndScaleTakeAnyLength) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (size_t n = 1; n < 70; ++n) {
    Rows rows(DType::kFp16, 1, n, random);
    std::vector<float> values = RandomFloats(n, random);
    const std::vector<float> before = values;
    AddScaled(DType::kFp16, 0.5f, rows.row(0), values.data(), n);
    double dot = 0.0;
    for (size_t i = 0; i < n; ++i) {
      ASSERT_NEAR(values[i], before[i] + 0.5 * rows.value(0, i), 1e-6);
      dot += double{values[i]} * before[i];
    }
    EXPECT_NEAR(Dot(values.data(), before.data(), n), dot, 1e-4);
    std::vector<float> scaled = values;
    Scale(3.0f, scaled.data(), n);
    for (size_t i = 0; i < n; ++i) ASSERT_FLOAT_EQ(scaled[i], 3.0f * values[i]);
  }
}

TEST_P(Simd, MaxIgnoresNanAndIsMinusInfinityOfNothing) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Max(nullptr, 0), -infinity);
  for (size_t n = 1; n < 70; ++n) {
    for (size_t at = 0; at < n; ++at) {
      std::vector<float> values(n, -3.0f);
      values[at] = -2.0f;
      values[(at + 1) % n] = n > 1 ? std::nanf("") : -2.0f;
      ASSERT_EQ(Max(values.data(), n), -2.0f) << n << " " << at;
    }
  }
}

TEST_P(Simd, ExpSumAgreesWithDouble) {
  for (size_t n : {1, 5, 16, 64, 67}) {
    std::vector<float> values(n);
    for (size_t i = 0; i < n; ++i) values[i] = 3.0f - 1.7f * static_cast<float>(i);
    const std::vector<float> before = values;
    const float sum = ExpSum(3.0f, values.data(), n);
    double expected_sum = 0.0;
    for (size_t i = 0; i < n; ++i) {
      const double expected = std::exp(double{before[i]} - 3.0);
      ASSERT_NEAR(values[i], expected, 1e-6 * expected + 1e-38) << i;
      expected_sum += expected;
    }
    EXPECT_NEAR(sum, expected_sum, 1e-6 * expected_sum);
  }
}

TEST_P(Simd, ExpSumOfMinusInfinityIsZeroAndOfNanIsNan) {
  for (size_t n : {1, 16, 35}) {
    std::vector<float> values(n, -std::numeric_limits<float>::infinity());
    EXPECT_EQ(ExpSum(0.0f, values.data(), n), 0.0f);
    values.assign(n, 0.0f);
    values[n / 2] = std::nanf("");
    EXPECT_TRUE(std::isnan(ExpSum(0.0f, values.data(), n)));
  }
}

}  // namespace
}  // namespace clusterkv::gpu::host
