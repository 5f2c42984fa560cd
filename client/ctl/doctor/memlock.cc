#include "client/ctl/doctor/memlock.h"

#include <fmt/format.h>

#include <sstream>

#include "absl/strings/numbers.h"
#include "client/ctl/terminal_text.h"

namespace clusterkv::client::ctl {
namespace {

// The soft limit; empty if the file has none.
std::string SoftLimit(const std::string& limits) {
  std::istringstream file(limits);
  constexpr char kName[] = "Max locked memory";
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(kName)) continue;
    std::istringstream words(line.substr(sizeof(kName) - 1));
    std::string soft;
    words >> soft;
    return soft;
  }
  return {};
}

}  // namespace

Check CheckMemlock(const std::string& limits, const std::string& whose, uint64_t bytes,
                   bool has_gpu) {
  Check check{.name = "memlock", .verdict = Verdict::kOk, .found = {}, .advice = {}};
  const std::string soft = SoftLimit(limits);
  uint64_t most = 0;
  if (soft == "unlimited") {
    check.found = fmt::format("unlimited for {}", whose);
    return check;
  }
  if (!absl::SimpleAtoi(soft, &most)) {
    check.verdict = Verdict::kSkip;
    check.found = fmt::format("the limit of {} is unknown", whose);
    return check;
  }
  check.found = fmt::format("{} for {}", BytesText(static_cast<double>(most)), whose);
  if (!has_gpu) {
    check.found += "; the host backend pins nothing";
  } else if (bytes == 0 || most < bytes) {
    check.verdict = Verdict::kWarn;
    check.found += bytes == 0 ? ""
                              : fmt::format(", less than the pool's {}",
                                            BytesText(static_cast<double>(bytes)));
    check.advice =
        "LimitMEMLOCK=infinity in the unit, docker --ulimit memlock=-1, or CAP_IPC_LOCK: some "
        "drivers count pinned memory";
  }
  return check;
}

}  // namespace clusterkv::client::ctl
