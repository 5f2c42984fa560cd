// An arena without a daemon.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "client/arena.h"

namespace clusterkv::client {

class HostBytes final : public gpu::DeviceMemory {
 public:
  explicit HostBytes(size_t bytes) : bytes_(bytes) {}
  std::byte* data() const override { return bytes_.data(); }
  size_t bytes() const override { return bytes_.size(); }
  absl::Status Clear() override {
    std::ranges::fill(bytes_, std::byte{0});
    return absl::OkStatus();
  }
  absl::StatusOr<gpu::UniqueFd> Export() const override {
    return absl::InvalidArgumentError("not exportable");
  }

 private:
  mutable std::vector<std::byte> bytes_;
};

inline Arena HostArena(uint32_t id, size_t bytes) {
  return {.id = id, .memory = std::make_shared<HostBytes>(bytes)};
}

}  // namespace clusterkv::client
