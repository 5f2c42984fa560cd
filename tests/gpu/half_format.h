// The 16-bit storage formats by their definition, in double: what the product's bit tricks are
// compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "gpu/dtype.h"

namespace clusterkv::gpu {

class HalfFormat {
 public:
  explicit HalfFormat(DType dtype) : mantissa_bits_(dtype == DType::kBf16 ? 7 : 10) {}

  double Decode(uint16_t bits) const {
    const int fraction = bits & ((1 << mantissa_bits_) - 1);
    const int field = (bits & 0x7fff) >> mantissa_bits_;
    const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
    if (field == special()) {
      return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                           : std::numeric_limits<double>::quiet_NaN();
    }
    if (field == 0) return sign * std::ldexp(fraction, 1 - bias() - mantissa_bits_);
    return sign * std::ldexp(fraction + (1 << mantissa_bits_), field - bias() - mantissa_bits_);
  }

  // Round to nearest, ties to even.
  uint16_t Encode(double value) const {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7fff);
    if (std::isinf(value)) return static_cast<uint16_t>(sign | special() << mantissa_bits_);
    if (value == 0.0) return static_cast<uint16_t>(sign);
    int exponent = 0;
    std::frexp(value, &exponent);
    exponent = std::max(exponent - 1, 1 - bias());
    const double scaled = std::ldexp(std::fabs(value), mantissa_bits_ - exponent);
    // Counting up from the last number below this binade: a carry runs into the exponent, and a
    // count below one binade is subnormal.
    const int units = static_cast<int>(std::nearbyint(scaled));
    const int bits = ((exponent + bias() - 1) << mantissa_bits_) + units;
    return static_cast<uint16_t>(sign | std::min(bits, special() << mantissa_bits_));
  }

 private:
  int exponent_bits() const { return 15 - mantissa_bits_; }
  int bias() const { return (1 << (exponent_bits() - 1)) - 1; }
  int special() const { return (1 << exponent_bits()) - 1; }

  const int mantissa_bits_;
};

}  // namespace clusterkv::gpu
