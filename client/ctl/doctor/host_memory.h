// Does the folder of the host memory have the file system and the room that the daemon needs?
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "client/ctl/doctor/check.h"
#include "client/ctl/doctor/machine.h"
#include "client/ctl/doctor/mounts.h"

namespace clusterkv::client::ctl {

struct HostMemoryFacts {
  std::string directory;
  std::optional<Mount> mount;
  std::optional<FileSystemUse> use;
  std::optional<uint64_t> available_bytes;  // of the machine's memory
  std::optional<uint64_t>
      cgroup_left_bytes;      // to the limit of this process's cgroup, if it has one
  uint64_t wanted_bytes = 0;  // of the daemon to be started; 0: nobody said
  uint64_t taken_bytes = 0;   // of the daemon that runs
};

HostMemoryFacts ReadHostMemory(const Machine& machine, const std::string& directory);

// `needs_tmpfs`: the cuda backend does.
Check CheckHostMemory(const HostMemoryFacts& facts, bool needs_tmpfs);

// Are its pages huge ones?
Check CheckHugePages(const Machine& machine, const HostMemoryFacts& facts);

}  // namespace clusterkv::client::ctl
