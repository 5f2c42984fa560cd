// Which file system is a folder on?
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "client/ctl/doctor/machine.h"

namespace clusterkv::client::ctl {

struct Mount {
  std::string point;
  std::string type;     // "tmpfs"
  std::string options;  // of the file system: "rw,size=8g,huge=advise"
};

// Of an absolute path, which need not exist yet; nullopt where /proc does not tell.
std::optional<Mount> MountOf(const Machine& machine, const std::string& path);

struct FileSystemUse {
  uint64_t total_bytes = 0;
  uint64_t free_bytes = 0;  // to whoever asks
};

// Of a mount point; nullopt if it cannot be asked.
std::optional<FileSystemUse> UseOf(const std::string& path);

}  // namespace clusterkv::client::ctl
