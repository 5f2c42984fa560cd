#include "client/ctl/doctor/driver.h"

#include <fmt/format.h>

namespace clusterkv::client::ctl {
namespace {

// Preset cuda is built with CUDA 13, whose first driver is 580.
constexpr int kNeededCuda = 13000;

std::string CudaText(int version) {
  return fmt::format("CUDA {}.{}", version / 1000, version % 1000 / 10);
}

}  // namespace

std::vector<std::string> PciGpus(const Machine& machine) {
  std::vector<std::string> gpus;
  for (const std::string& address : machine.List("/sys/bus/pci/devices")) {
    const std::string folder = "/sys/bus/pci/devices/" + address;
    const std::string kind = machine.Read(folder + "/class").value_or("");
    const bool display = kind.starts_with("0x0300") || kind.starts_with("0x0302");
    if (display && machine.Read(folder + "/vendor") == "0x10de") gpus.push_back(address);
  }
  return gpus;
}

Check CheckDriver(const DriverFacts& driver, const std::vector<std::string>& pci_gpus) {
  Check check{.name = "driver", .verdict = Verdict::kOk, .found = {}, .advice = {}};
  if (!driver.found && pci_gpus.empty()) {
    check.verdict = Verdict::kSkip;
    check.found = "no NVIDIA GPU and no driver; the host backend needs neither";
    return check;
  }
  if (!driver.found) {
    check.verdict = Verdict::kFail;
    check.found =
        fmt::format("{} NVIDIA GPU(s) on the PCI bus, but {}", pci_gpus.size(), driver.problem);
    check.advice =
        "install NVIDIA's driver, 580 or later; in a container: run it with the nvidia runtime, "
        "NVIDIA_VISIBLE_DEVICES and NVIDIA_DRIVER_CAPABILITIES=compute,utility";
    return check;
  }
  const std::string name =
      driver.version.empty() ? std::string("driver") : "driver " + driver.version;
  if (!driver.problem.empty() || driver.gpus.empty()) {
    check.verdict = Verdict::kFail;
    check.found =
        fmt::format("{}: {}", name, driver.problem.empty() ? "it shows no GPU" : driver.problem);
    check.advice =
        "see what nvidia-smi and dmesg say; in a container: /dev/nvidia* and "
        "NVIDIA_VISIBLE_DEVICES; a driver updated while loaded needs a reboot";
    return check;
  }
  check.found =
      fmt::format("{} ({}), {} GPU(s)", name, CudaText(driver.cuda_version), driver.gpus.size());
  if (driver.cuda_version < kNeededCuda) {
    check.verdict = Verdict::kFail;
    check.advice = fmt::format("the cuda backend needs {}: install driver 580 or later",
                               CudaText(kNeededCuda));
  }
  return check;
}

}  // namespace clusterkv::client::ctl
