// Does the device still answer? Once a tick a small piece of work goes through it, on a thread that
// may wedge there; whoever asks reads how long the last answer is ago, and waits for nothing.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace clusterkv::service {

// Belongs to one thread.
class DeviceWatch {
 public:
  // A healthy device answers within milliseconds, also behind a burst of clustering.
  static constexpr absl::Duration kPatience = absl::Seconds(10);

  explicit DeviceWatch(absl::Time now) : answered_(now) {}

  // A probe is to be sent: none is on its way, and the device is not dead.
  bool due() const { return !waiting_ && failure_.ok(); }
  void Sent() { waiting_ = true; }
  void Answered(const absl::Status& status, absl::Time now);

  // Since the last answer, or since it was looked at first.
  absl::Duration age(absl::Time now) const { return now - answered_; }
  // Why the device cannot be relied on; empty: it can.
  std::string problem(absl::Time now) const;

 private:
  absl::Time answered_;
  bool waiting_ = false;
  absl::Status failure_;  // stays: a device does not come back
};

}  // namespace clusterkv::service
