#include "client/ctl/doctor/numa.h"

#include <fmt/format.h>

#include <optional>
#include <set>
#include <sstream>

#include "absl/strings/str_join.h"
#include "gpu/numa_nodes.h"

namespace clusterkv::client::ctl {
namespace {

std::set<int> AllowedNodes(const Machine& machine) {
  std::istringstream status(machine.Read("/proc/self/status").value_or(""));
  constexpr char kName[] = "Mems_allowed_list:";
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(kName)) return gpu::ParseNodeList(line.substr(sizeof(kName) - 1));
  }
  return {};
}

}  // namespace

Check CheckNuma(const Machine& machine, const std::vector<std::string>& gpus) {
  Check check{.name = "NUMA", .verdict = Verdict::kOk, .found = {}, .advice = {}};
  const auto online = machine.Read("/sys/devices/system/node/online");
  if (!online) {
    check.verdict = Verdict::kSkip;
    check.found = "the kernel tells of no nodes";
    return check;
  }
  const std::set<int> nodes = gpu::ParseNodeList(*online);
  if (nodes.size() <= 1) {
    check.found = "one node";
    return check;
  }
  const std::set<int> allowed = AllowedNodes(machine);
  std::vector<std::string> places, far;
  for (const std::string& address : gpus) {
    const std::optional<int> node = gpu::NodeOfPciDevice(address, machine.Path(gpu::kSysfs));
    if (!node) {
      places.push_back(fmt::format("GPU {} on an unknown node", address));
      continue;
    }
    places.push_back(fmt::format("GPU {} on node {}", address, *node));
    if (!allowed.empty() && !allowed.contains(*node)) far.push_back(std::to_string(*node));
  }
  check.found = fmt::format("nodes {}, memory allowed on {}{}{}", absl::StrJoin(nodes, ","),
                            absl::StrJoin(allowed, ","), places.empty() ? "" : "; ",
                            absl::StrJoin(places, ", "));
  if (!far.empty()) {
    check.verdict = Verdict::kWarn;
    check.advice = fmt::format(
        "let the daemon take memory of node {} (cpuset, numactl --membind, or Kubernetes' topology "
        "manager): reads across the sockets are slower",
        absl::StrJoin(far, ","));
  }
  return check;
}

}  // namespace clusterkv::client::ctl
