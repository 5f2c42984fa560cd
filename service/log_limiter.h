// Bounds how often something is logged, so that a client cannot fill a disk.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>

#include "absl/time/time.h"

namespace clusterkv::service {

// Thread-safe. A bucket of `burst` lines that fills again by one each `interval`.
class LogLimiter {
 public:
  LogLimiter(uint32_t burst, absl::Duration interval)
      : burst_(burst), interval_(interval), tokens_(burst) {}

  // nullopt: not this one. Else how many were left out since the last that was logged.
  std::optional<uint64_t> Admit(absl::Time now);

 private:
  const double burst_;
  const absl::Duration interval_;
  std::mutex mu_;
  // Guarded by mu_.
  double tokens_;
  absl::Time filled_ = absl::InfinitePast();
  uint64_t left_out_ = 0;
};

}  // namespace clusterkv::service
