// Is there a driver that the cuda backend can use?
#pragma once

#include <string>
#include <vector>

#include "client/ctl/doctor/check.h"
#include "client/ctl/doctor/driver_probe.h"
#include "client/ctl/doctor/machine.h"

namespace clusterkv::client::ctl {

// Addresses of NVIDIA's GPUs on the PCI bus, with or without a driver.
std::vector<std::string> PciGpus(const Machine& machine);

// Skipped where there is no GPU at all: the host backend needs none.
Check CheckDriver(const DriverFacts& driver, const std::vector<std::string>& pci_gpus);

}  // namespace clusterkv::client::ctl
