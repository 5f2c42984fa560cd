// Durations counted by fixed bounds, as Prometheus wants them. A plain value: whoever owns it
// guards it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace clusterkv::service {

class Histogram {
 public:
  // Upper bounds, seconds: from a served layer under a direct hand-over to a stuck client's minute.
  static constexpr std::array<double, 18> kBounds = {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005,
                                                     0.01,   0.025,   0.05,   0.1,   0.25,   0.5,
                                                     1,      2.5,     5,      10,    30,     60};

  // A clock that was set back gives less than 0: that counts as 0.
  void Observe(double seconds) {
    const double counted = std::max(seconds, 0.0);
    ++counts_[static_cast<size_t>(std::ranges::lower_bound(kBounds, counted) - kBounds.begin())];
    sum_ += counted;
  }

  // Of each bucket by itself; the last is above all bounds.
  const std::array<uint64_t, kBounds.size() + 1>& counts() const { return counts_; }
  double sum() const { return sum_; }

 private:
  std::array<uint64_t, kBounds.size() + 1> counts_{};
  double sum_ = 0;
};

// For where the mean is enough.
struct Mean {
  uint64_t count = 0;
  double sum = 0;

  void Observe(double value) {
    ++count;
    sum += std::max(value, 0.0);
  }
};

}  // namespace clusterkv::service
