#include "service/log_limiter.h"

#include <algorithm>
#include <utility>

namespace clusterkv::service {

std::optional<uint64_t> LogLimiter::Admit(absl::Time now) {
  const std::lock_guard lock(mu_);
  // A clock that was set back fills nothing.
  const absl::Duration passed = std::max(now - filled_, absl::ZeroDuration());
  tokens_ = std::min(burst_, tokens_ + absl::FDivDuration(passed, interval_));
  filled_ = now;
  if (tokens_ < 1) {
    ++left_out_;
    return std::nullopt;
  }
  tokens_ -= 1;
  return std::exchange(left_out_, 0);
}

}  // namespace clusterkv::service
