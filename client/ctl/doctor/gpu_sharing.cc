#include "client/ctl/doctor/gpu_sharing.h"

#include <fmt/format.h>

#include <algorithm>

#include "absl/strings/str_join.h"

namespace clusterkv::client::ctl {
namespace {

constexpr int kLeastCapability = 80;  // 8.0

Check CheckGpu(const GpuFacts& gpu, bool mps_running) {
  Check check{.name = {}, .verdict = Verdict::kFail, .found = {}, .advice = {}};
  const int capability = 10 * gpu.capability_major + gpu.capability_minor;
  if (capability < kLeastCapability) {
    check.found =
        fmt::format("has compute capability {}.{}", gpu.capability_major, gpu.capability_minor);
    check.advice = "the cuda backend needs 8.0 (Ampere) or later: choose another with --devices";
  } else if (gpu.compute_mode == ComputeMode::kProhibited) {
    check.found = "has compute mode Prohibited";
    check.advice = "nvidia-smi -c DEFAULT";
  } else if (gpu.compute_mode == ComputeMode::kExclusiveProcess && !mps_running) {
    check.found =
        "has compute mode Exclusive_Process, and MPS does not run: the daemon's or the "
        "worker's context will be refused";
    check.advice = "nvidia-smi -c DEFAULT, or start MPS (nvidia-cuda-mps-control -d)";
  } else if (!gpu.shares_by_descriptor) {
    check.found = "cannot pass memory as a file descriptor (cuMemCreate), as on WSL or some vGPUs";
    check.advice =
        "start the daemon with --gpu-sharing legacy, or use a GPU that is passed through whole";
  } else if (gpu.mig.value_or(false)) {
    check.verdict = Verdict::kWarn;
    check.found = "is in MIG mode: memory is shared within one instance only";
    check.advice = "give the daemon and its workers the same MIG device";
  } else {
    check.verdict = Verdict::kOk;
  }
  return check;
}

// Failures come first.
int Weight(Verdict verdict) {
  return verdict == Verdict::kFail ? 2 : verdict == Verdict::kWarn ? 1 : 0;
}

}  // namespace

Check CheckGpuSharing(const DriverFacts& driver, bool mps_running) {
  Check check{.name = "GPU sharing", .verdict = Verdict::kSkip, .found = {}, .advice = {}};
  if (driver.gpus.empty()) {
    check.found = "no GPU that the driver shows";
    return check;
  }
  check.verdict = Verdict::kOk;
  std::vector<std::string> wrong;
  for (const GpuFacts& gpu : driver.gpus) {
    const Check one = CheckGpu(gpu, mps_running);
    if (one.verdict == Verdict::kOk) continue;
    wrong.push_back(fmt::format("{} at {} {}", gpu.name, gpu.pci_address, one.found));
    if (Weight(one.verdict) <= Weight(check.verdict)) continue;
    check.verdict = one.verdict;
    check.advice = one.advice;
  }
  check.found = wrong.empty()
                    ? fmt::format("{} GPU(s), {}: memory goes to workers as file descriptors",
                                  driver.gpus.size(), driver.gpus.front().name)
                    : absl::StrJoin(wrong, "; ");
  return check;
}

}  // namespace clusterkv::client::ctl
