// On which NUMA node this process takes memory: the kernel's memory policy, of one thread.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <set>

#include "absl/status/statusor.h"
#include "service/config.h"

namespace clusterkv::service {

// Where the host pool shall lie: on the node that was asked for, or next to the device, where there
// is more than one with memory. nullopt: wherever the kernel puts it.
std::optional<int> HostPoolNode(const Config& config, std::optional<int> device_node,
                                const std::set<int>& memory_nodes);

// Has whoever started this process set a policy, numactl for one? It stays in force then, unless a
// node is asked for by number.
bool HasMemoryPolicy();

// The node on which a page lies that this process has mapped. Errors: what errno says.
absl::StatusOr<int> NodeOfPage(const void* address);

// While it lives, memory that its thread takes comes from one node, as long as there is some. Also
// pages of tmpfs and of hugetlbfs; those of other file systems go by who first touches them.
class PreferredNode {
 public:
  // Errors: what errno says; PERMISSION_DENIED in a container whose seccomp profile has no place
  // for the call.
  static absl::StatusOr<std::unique_ptr<PreferredNode>> Create(int node);
  // On the same thread: the policy is what it was.
  ~PreferredNode();
  PreferredNode(const PreferredNode&) = delete;
  PreferredNode& operator=(const PreferredNode&) = delete;

 private:
  struct Policy;
  explicit PreferredNode(std::unique_ptr<Policy> before);

  const std::unique_ptr<Policy> before_;
};

}  // namespace clusterkv::service
