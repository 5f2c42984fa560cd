// What NVIDIA's driver says of its GPUs, asked through its own libraries, which are looked for at
// run time: clusterkvctl needs neither them nor CUDA to build or start.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace clusterkv::client::ctl {

enum class ComputeMode { kDefault, kProhibited, kExclusiveProcess, kUnknown };

struct GpuFacts {
  std::string name = {};
  std::string pci_address = {};  // "0000:65:00.0", as in /sys/bus/pci/devices
  int capability_major = 0, capability_minor = 0;
  ComputeMode compute_mode = ComputeMode::kUnknown;
  bool shares_by_descriptor = false;  // cuMemCreate with a POSIX file descriptor handle
  std::optional<bool> mig = {};       // nullopt: NVML does not say
};

struct DriverFacts {
  bool found = false;    // libcuda is there
  std::string problem;   // why it does not work; empty: it does
  std::string version;   // of the driver; empty where NVML is missing
  int cuda_version = 0;  // 13000 is 13.0
  std::vector<GpuFacts> gpus;
};

struct DriverLibraries {
  std::string cuda = "libcuda.so.1";
  std::string nvml = "libnvidia-ml.so.1";
};

// Makes no context: nothing of it stays on a GPU.
DriverFacts ProbeDriver(const DriverLibraries& libraries = {});

}  // namespace clusterkv::client::ctl
