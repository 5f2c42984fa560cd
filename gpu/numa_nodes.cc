#include "gpu/numa_nodes.h"

#include <fstream>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace clusterkv::gpu {
namespace {

// "" where it cannot be read.
std::string FirstLine(const std::string& path) {
  std::string line;
  std::getline(std::ifstream(path), line);
  return line;
}

}  // namespace

std::set<int> ParseNodeList(const std::string& text) {
  std::set<int> nodes;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    const std::vector<std::string> ends = absl::StrSplit(part, '-');
    int first = 0, last = 0;
    if (!absl::SimpleAtoi(ends.front(), &first) || !absl::SimpleAtoi(ends.back(), &last)) continue;
    for (int node = first; node <= last; ++node) nodes.insert(node);
  }
  return nodes;
}

std::set<int> MemoryNodes(const std::string& sysfs) {
  return ParseNodeList(FirstLine(sysfs + "/devices/system/node/has_memory"));
}

std::optional<int> NodeOfPciDevice(const std::string& address, const std::string& sysfs) {
  const std::string path =
      sysfs + "/bus/pci/devices/" + absl::AsciiStrToLower(address) + "/numa_node";
  int node = -1;
  if (!absl::SimpleAtoi(FirstLine(path), &node) || node < 0) return std::nullopt;
  return node;
}

}  // namespace clusterkv::gpu
