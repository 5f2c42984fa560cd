#include "service/device_watch.h"

#include <fmt/format.h>

namespace clusterkv::service {

void DeviceWatch::Answered(const absl::Status& status, absl::Time now) {
  waiting_ = false;
  if (status.ok()) {
    answered_ = now;
  } else if (failure_.ok()) {
    failure_ = status;
  }
}

std::string DeviceWatch::problem(absl::Time now) const {
  if (!failure_.ok()) {
    return fmt::format("the device has failed: {}", std::string(failure_.message()));
  }
  if (age(now) <= kPatience) return {};
  return fmt::format("the device has not answered for {:.0f} s", absl::ToDoubleSeconds(age(now)));
}

}  // namespace clusterkv::service
