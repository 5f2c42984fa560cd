#include "client/ctl/doctor/numa.h"

#include <fmt/format.h>

#include <set>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace clusterkv::client::ctl {
namespace {

// "0-1,4" as the kernel writes lists.
std::set<int> ParseList(const std::string& text) {
  std::set<int> numbers;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    const std::vector<std::string> ends = absl::StrSplit(part, '-');
    int first = 0, last = 0;
    if (!absl::SimpleAtoi(ends.front(), &first) || !absl::SimpleAtoi(ends.back(), &last)) continue;
    for (int number = first; number <= last; ++number) numbers.insert(number);
  }
  return numbers;
}

std::set<int> AllowedNodes(const Machine& machine) {
  std::istringstream status(machine.Read("/proc/self/status").value_or(""));
  constexpr char kName[] = "Mems_allowed_list:";
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(kName)) return ParseList(line.substr(sizeof(kName) - 1));
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
  const std::set<int> nodes = ParseList(*online);
  if (nodes.size() <= 1) {
    check.found = "one node";
    return check;
  }
  const std::set<int> allowed = AllowedNodes(machine);
  std::vector<std::string> places, far;
  for (const std::string& gpu : gpus) {
    int node = -1;
    const auto text = machine.Read("/sys/bus/pci/devices/" + gpu + "/numa_node");
    if (!text || !absl::SimpleAtoi(*text, &node) || node < 0) {
      places.push_back(fmt::format("GPU {} on an unknown node", gpu));
      continue;
    }
    places.push_back(fmt::format("GPU {} on node {}", gpu, node));
    if (!allowed.empty() && !allowed.contains(node)) far.push_back(std::to_string(node));
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
