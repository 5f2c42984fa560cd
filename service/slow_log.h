// Operations that took too long, with what they spent their time on.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <string>

#include "absl/time/time.h"
#include "service/log_limiter.h"
#include "service/logging.h"

namespace clusterkv::service {

// The phases of one operation, one after the other. Goes from thread to thread with it.
class OperationTrace {
 public:
  static constexpr size_t kMaxPhases = 8;

  // The first phase begins. `request_id`: of the call that it serves; empty if of none.
  explicit OperationTrace(std::string request_id = {});

  // The phase that runs ends here, and the next begins. `name` lives for ever and ends with _ms.
  // Returns the seconds it took.
  double End(const char* name);
  // Of all phases that have ended.
  double seconds() const { return total_milliseconds_ / 1000; }

 private:
  friend class SlowLog;
  struct Phase {
    const char* name;
    double milliseconds;
  };
  std::string request_id_;
  std::chrono::steady_clock::time_point since_;
  std::array<Phase, kMaxPhases> phases_{};
  size_t count_ = 0;
  double total_milliseconds_ = 0;
};

// Thread-safe.
class SlowLog {
 public:
  // `threshold`: from here on an operation is slow; 0: none is.
  explicit SlowLog(absl::Duration threshold);

  enum Operation { kFetchClusters, kIngestTokens, kClustering, kSessionEnd, kOperations };
  // At the operation's end. A slow one becomes a warning: total_ms, each phase, then `fields`. Of
  // each operation five at once at most, and then one a second.
  void Report(Operation operation, const OperationTrace& trace, LogFields fields);

 private:
  const double threshold_milliseconds_;
  std::array<LogLimiter, kOperations> limiters_;
};

}  // namespace clusterkv::service
