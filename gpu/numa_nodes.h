// NUMA nodes as the kernel tells of them, below /sys, or a folder of a test.
#pragma once

#include <optional>
#include <set>
#include <string>

namespace clusterkv::gpu {

inline constexpr char kSysfs[] = "/sys";

// "0-1,4" as the kernel writes lists; what is no number is left out.
std::set<int> ParseNodeList(const std::string& text);
// The nodes that have memory; empty where the kernel tells of none.
std::set<int> MemoryNodes(const std::string& sysfs = kSysfs);
// The node that a device is next to. `address` on the PCI bus: "0000:1b:00.0", in either case.
// nullopt: the kernel knows none, or no such device.
std::optional<int> NodeOfPciDevice(const std::string& address, const std::string& sysfs = kSysfs);

}  // namespace clusterkv::gpu
