#include "client/ctl/doctor/driver_probe.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <array>

namespace clusterkv::client::ctl {
namespace {

// Of cuda.h and nvml.h, whose numbers do not change.
constexpr int kComputeMode = 20, kPciBus = 33, kPciDevice = 34, kPciDomain = 50;
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kPosixDescriptors = 103;
constexpr int kNotSupported = 3;  // NVML_ERROR_NOT_SUPPORTED

// A shared library; stays loaded, since the driver's do not like to be unloaded.
class Library {
 public:
  explicit Library(const std::string& path)
      : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {}

  bool found() const { return handle_ != nullptr; }
  // Calls a function that returns 0 for success; -1 where it is not there.
  template <typename... Arguments>
  int Call(const char* name, Arguments... arguments) const {
    void* const symbol = handle_ == nullptr ? nullptr : dlsym(handle_, name);
    if (symbol == nullptr) return -1;
    return reinterpret_cast<int (*)(Arguments...)>(symbol)(arguments...);
  }

 private:
  void* const handle_;
};

std::string ErrorName(const Library& cuda, int error) {
  const char* name = nullptr;
  if (cuda.Call("cuGetErrorName", error, &name) == 0 && name != nullptr) return name;
  return fmt::format("error {}", error);
}

ComputeMode ToComputeMode(int value) {
  switch (value) {
    case 0:
      return ComputeMode::kDefault;
    case 2:
      return ComputeMode::kProhibited;
    case 3:
      return ComputeMode::kExclusiveProcess;
    default:
      return ComputeMode::kUnknown;
  }
}

GpuFacts ProbeGpu(const Library& cuda, int device) {
  const auto attribute = [&](int which) {
    int value = 0;
    cuda.Call("cuDeviceGetAttribute", &value, which, device);
    return value;
  };
  GpuFacts gpu;
  std::array<char, 128> name{};
  if (cuda.Call("cuDeviceGetName", name.data(), static_cast<int>(name.size()) - 1, device) == 0) {
    gpu.name = name.data();
  }
  gpu.pci_address = fmt::format("{:04x}:{:02x}:{:02x}.0", attribute(kPciDomain), attribute(kPciBus),
                                attribute(kPciDevice));
  gpu.capability_major = attribute(kCapabilityMajor);
  gpu.capability_minor = attribute(kCapabilityMinor);
  gpu.compute_mode = ToComputeMode(attribute(kComputeMode));
  gpu.shares_by_descriptor = attribute(kPosixDescriptors) == 1;
  return gpu;
}

// MIG and the driver's version are NVML's to tell.
void AskNvml(const Library& nvml, DriverFacts& facts) {
  if (nvml.Call("nvmlInit_v2") != 0) return;
  std::array<char, 96> version{};
  if (nvml.Call("nvmlSystemGetDriverVersion", version.data(),
                static_cast<unsigned>(version.size()) - 1) == 0) {
    facts.version = version.data();
  }
  for (GpuFacts& gpu : facts.gpus) {
    void* device = nullptr;
    if (nvml.Call("nvmlDeviceGetHandleByPciBusId_v2", gpu.pci_address.c_str(), &device) != 0) {
      continue;
    }
    unsigned current = 0, pending = 0;
    const int answer = nvml.Call("nvmlDeviceGetMigMode", device, &current, &pending);
    if (answer == 0) gpu.mig = current == 1;
    if (answer == kNotSupported) gpu.mig = false;
  }
  nvml.Call("nvmlShutdown");
}

}  // namespace

DriverFacts ProbeDriver(const DriverLibraries& libraries) {
  DriverFacts facts;
  const Library cuda(libraries.cuda);
  facts.found = cuda.found();
  if (!facts.found) {
    facts.problem = fmt::format("{} is not there", libraries.cuda);
    return facts;
  }
  cuda.Call("cuDriverGetVersion", &facts.cuda_version);
  if (const int error = cuda.Call("cuInit", 0u); error != 0) {
    facts.problem = fmt::format("cuInit: {}", ErrorName(cuda, error));
  } else {
    int count = 0;
    cuda.Call("cuDeviceGetCount", &count);
    for (int i = 0; i < count; ++i) {
      int device = 0;
      if (cuda.Call("cuDeviceGet", &device, i) == 0) facts.gpus.push_back(ProbeGpu(cuda, device));
    }
  }
  AskNvml(Library(libraries.nvml), facts);
  return facts;
}

}  // namespace clusterkv::client::ctl
