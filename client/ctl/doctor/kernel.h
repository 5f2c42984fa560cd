// Can the kernel prove that a worker is dead?
#pragma once

#include <string>

#include "client/ctl/doctor/check.h"

namespace clusterkv::client::ctl {

struct KernelFacts {
  std::string release;
  bool pidfd = false;       // pidfd_open, Linux 5.3
  bool peer_pidfd = false;  // SO_PEERPIDFD, Linux 6.5
};

// Tries both on this process itself.
KernelFacts ProbeKernel();
Check CheckKernel(const KernelFacts& facts);

}  // namespace clusterkv::client::ctl
