// The kubelet, as a device plugin meets it: a socket that comes and goes, and Register.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace clusterkv::service {

// Which file lies at a path: a socket that was made again is another one.
struct FileIdentity {
  uint64_t device = 0, inode = 0;
  int64_t changed_nanoseconds = 0;

  bool operator==(const FileIdentity&) const = default;
};

std::optional<FileIdentity> IdentityOf(const std::string& path);

// True if something accepts connections there.
bool Answers(const std::string& socket_path);

// Tells the kubelet at `socket_path` of the plugin whose socket has the name `endpoint` in the same
// folder. Waits 5 s at most. Errors: as the kubelet says; UNAVAILABLE, DEADLINE_EXCEEDED.
absl::Status RegisterWithKubelet(const std::string& socket_path, const std::string& endpoint);

}  // namespace clusterkv::service
