// A point in time by which a call must have an answer.
#pragma once

#include <algorithm>
#include <chrono>

#include "absl/time/time.h"

namespace clusterkv::client {

class Deadline {
 public:
  // Below 0 counts as 0; "infinite" as a year, so that no wait is without a bound.
  explicit Deadline(absl::Duration timeout)
      : time_(std::chrono::steady_clock::now() +
              absl::ToChronoMicroseconds(
                  std::clamp(timeout, absl::ZeroDuration(), absl::Hours(24 * 365)))) {}

  std::chrono::steady_clock::time_point time() const { return time_; }
  bool passed() const { return std::chrono::steady_clock::now() >= time_; }
  // Not below 0.
  absl::Duration remaining() const {
    return std::max(absl::ZeroDuration(),
                    absl::FromChrono(time_ - std::chrono::steady_clock::now()));
  }
  // The earlier of this one and `timeout` from now.
  Deadline Within(absl::Duration timeout) const { return Deadline(std::min(timeout, remaining())); }

 private:
  std::chrono::steady_clock::time_point time_;
};

}  // namespace clusterkv::client
