#include "service/numa_policy.h"

#include <fmt/format.h>
#include <numaif.h>

#include <array>
#include <cerrno>
#include <climits>
#include <utility>

namespace clusterkv::service {
namespace {

// As many as a kernel can be built for, and the bit more that the calls count.
constexpr unsigned long kMaxNodes = 1024;
constexpr unsigned long kWordBits = sizeof(unsigned long) * CHAR_BIT;

using NodeMask = std::array<unsigned long, kMaxNodes / kWordBits>;

absl::Status FromErrno(int error, const std::string& what) {
  return absl::ErrnoToStatus(error, what.c_str());
}

}  // namespace

struct PreferredNode::Policy {
  int mode = MPOL_DEFAULT;
  NodeMask nodes{};
};

std::optional<int> HostPoolNode(const Config& config, std::optional<int> device_node,
                                const std::set<int>& memory_nodes) {
  switch (config.host_numa) {
    case NumaPlacement::kOff:
      return std::nullopt;
    case NumaPlacement::kNode:
      return config.host_numa_node;
    case NumaPlacement::kAuto:
      break;
  }
  if (memory_nodes.size() < 2 || !device_node || !memory_nodes.contains(*device_node)) {
    return std::nullopt;
  }
  return device_node;
}

bool HasMemoryPolicy() {
  int mode = MPOL_DEFAULT;
  return get_mempolicy(&mode, nullptr, 0, nullptr, 0) == 0 && mode != MPOL_DEFAULT;
}

absl::StatusOr<int> NodeOfPage(const void* address) {
  int node = -1;
  // The call only reads, but is declared as if it did not.
  if (get_mempolicy(&node, nullptr, 0, const_cast<void*>(address), MPOL_F_NODE | MPOL_F_ADDR) !=
      0) {
    return FromErrno(errno, "cannot tell on which NUMA node a page lies");
  }
  return node;
}

PreferredNode::PreferredNode(std::unique_ptr<Policy> before) : before_(std::move(before)) {}

absl::StatusOr<std::unique_ptr<PreferredNode>> PreferredNode::Create(int node) {
  if (node < 0 || static_cast<unsigned long>(node) >= kMaxNodes) {
    return absl::InvalidArgumentError(fmt::format("there is no NUMA node {}", node));
  }
  auto before = std::make_unique<Policy>();
  if (get_mempolicy(&before->mode, before->nodes.data(), kMaxNodes + 1, nullptr, 0) != 0) {
    return FromErrno(errno, "cannot read the memory policy");
  }
  NodeMask wanted{};
  wanted[static_cast<unsigned long>(node) / kWordBits] |=
      1ul << (static_cast<unsigned long>(node) % kWordBits);
  if (set_mempolicy(MPOL_PREFERRED, wanted.data(), kMaxNodes + 1) != 0) {
    return FromErrno(errno, fmt::format("cannot prefer memory of NUMA node {}", node));
  }
  return std::unique_ptr<PreferredNode>(new PreferredNode(std::move(before)));
}

PreferredNode::~PreferredNode() {
  const bool is_default = before_->mode == MPOL_DEFAULT;
  set_mempolicy(before_->mode, is_default ? nullptr : before_->nodes.data(),
                is_default ? 0 : kMaxNodes + 1);
}

}  // namespace clusterkv::service
