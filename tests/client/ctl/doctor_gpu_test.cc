// What the doctor says of driver, GPUs, MPS and the container toolkit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "client/ctl/doctor/driver.h"
#include "client/ctl/doctor/driver_probe.h"
#include "client/ctl/doctor/gpu_sharing.h"
#include "client/ctl/doctor/mps.h"
#include "client/ctl/doctor/toolkit.h"
#include "tests/client/ctl/fake_root.h"

namespace clusterkv::client::ctl {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

DriverFacts FakeDriver(const char* kind) {
  setenv("FAKE_DRIVER", kind, 1);
  DriverFacts facts = ProbeDriver({.cuda = FAKE_DRIVER_PATH, .nvml = FAKE_DRIVER_PATH});
  unsetenv("FAKE_DRIVER");
  return facts;
}

// --- The driver itself --------------------------------------------------------------------------

TEST(ProbeDriver, AsksTheDriversLibraries) {
  const DriverFacts facts = FakeDriver("h100");
  EXPECT_TRUE(facts.found);
  EXPECT_THAT(facts.problem, IsEmpty());
  EXPECT_EQ(facts.version, "580.159.03");
  EXPECT_EQ(facts.cuda_version, 13000);
  ASSERT_EQ(facts.gpus.size(), 1u);
  const GpuFacts& gpu = facts.gpus[0];
  EXPECT_EQ(gpu.name, "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(gpu.pci_address, "0000:65:01.0");
  EXPECT_EQ(gpu.capability_major, 9);
  EXPECT_EQ(gpu.capability_minor, 0);
  EXPECT_EQ(gpu.compute_mode, ComputeMode::kDefault);
  EXPECT_TRUE(gpu.shares_by_descriptor);
  EXPECT_EQ(gpu.mig, false);
  EXPECT_EQ(FakeDriver("mig").gpus[0].mig, true);
}

TEST(ProbeDriver, TellsWhatFails) {
  const DriverFacts broken = FakeDriver("broken");
  EXPECT_TRUE(broken.found);
  EXPECT_EQ(broken.problem, "cuInit: CUDA_ERROR_UNKNOWN");
  EXPECT_THAT(broken.gpus, IsEmpty());
  const DriverFacts none = ProbeDriver({.cuda = "/none/libcuda.so.1", .nvml = "/none/libnvidia"});
  EXPECT_FALSE(none.found);
  EXPECT_EQ(none.problem, "/none/libcuda.so.1 is not there");
}

TEST(ProbeDriver, DoesWithoutNvml) {
  const DriverFacts facts = ProbeDriver({.cuda = FAKE_DRIVER_PATH, .nvml = "/none/libnvidia"});
  ASSERT_EQ(facts.gpus.size(), 1u);
  EXPECT_THAT(facts.version, IsEmpty());
  EXPECT_EQ(facts.gpus[0].mig, std::nullopt);
}

TEST(PciGpus, AreNvidiasDisplayDevices) {
  FakeRoot root;
  root.Gpu("0000:65:00.0").Gpu("0000:17:00.0");
  root.Write("/sys/bus/pci/devices/0000:00:1f.0/vendor", "0x8086")
      .Write("/sys/bus/pci/devices/0000:00:1f.0/class", "0x030000");
  root.Write("/sys/bus/pci/devices/0000:65:00.1/vendor", "0x10de")
      .Write("/sys/bus/pci/devices/0000:65:00.1/class", "0x040300");  // its audio
  EXPECT_THAT(PciGpus(Machine(root.path())), ElementsAre("0000:17:00.0", "0000:65:00.0"));
  EXPECT_THAT(PciGpus(Machine("/nonexistent")), IsEmpty());
}

TEST(CheckDriver, IsSkippedWithoutAGpu) { EXPECT_EQ(CheckDriver({}, {}).verdict, Verdict::kSkip); }

TEST(CheckDriver, FailsForAGpuWithoutADriver) {
  DriverFacts facts;
  facts.problem = "libcuda.so.1 is not there";
  const Check check = CheckDriver(facts, {"0000:65:00.0"});
  EXPECT_EQ(check.verdict, Verdict::kFail);
  EXPECT_THAT(check.found, AllOf(HasSubstr("1 NVIDIA GPU"), HasSubstr("libcuda.so.1")));
  EXPECT_THAT(check.advice, HasSubstr("NVIDIA_VISIBLE_DEVICES"));
}

TEST(CheckDriver, FailsForOneThatDoesNotStartOrShowsNoGpuOrIsTooOld) {
  EXPECT_EQ(CheckDriver(FakeDriver("broken"), {}).verdict, Verdict::kFail);
  EXPECT_THAT(CheckDriver(FakeDriver("broken"), {}).found, HasSubstr("CUDA_ERROR_UNKNOWN"));
  DriverFacts facts = FakeDriver("h100");
  EXPECT_EQ(CheckDriver(facts, {}).verdict, Verdict::kOk);
  EXPECT_EQ(CheckDriver(facts, {}).found, "driver 580.159.03 (CUDA 13.0), 1 GPU(s)");
  facts.cuda_version = 12080;
  EXPECT_EQ(CheckDriver(facts, {}).verdict, Verdict::kFail);
  EXPECT_THAT(CheckDriver(facts, {}).advice, HasSubstr("580"));
  facts.gpus.clear();
  EXPECT_EQ(CheckDriver(facts, {}).verdict, Verdict::kFail);
}

// --- Sharing ------------------------------------------------------------------------------------

TEST(CheckGpuSharing, IsFineForAnH100) {
  EXPECT_EQ(CheckGpuSharing(FakeDriver("h100"), false).verdict, Verdict::kOk);
  EXPECT_EQ(CheckGpuSharing({}, false).verdict, Verdict::kSkip);
}

TEST(CheckGpuSharing, TheWorstGpuDecidesAndAllAreNamed) {
  DriverFacts facts = FakeDriver("mig");
  EXPECT_EQ(CheckGpuSharing(facts, false).verdict, Verdict::kWarn);
  facts.gpus.push_back({.name = "Tesla T4",
                        .pci_address = "0000:17:00.0",
                        .capability_major = 7,
                        .capability_minor = 5});
  const Check check = CheckGpuSharing(facts, false);
  EXPECT_EQ(check.verdict, Verdict::kFail);
  EXPECT_THAT(check.found, AllOf(HasSubstr("MIG"), HasSubstr("Tesla T4 at 0000:17:00.0 has compute "
                                                             "capability 7.5")));
  EXPECT_THAT(check.advice, HasSubstr("8.0"));
}

TEST(CheckGpuSharing, ExclusiveModeNeedsMps) {
  DriverFacts facts = FakeDriver("h100");
  facts.gpus[0].compute_mode = ComputeMode::kExclusiveProcess;
  EXPECT_EQ(CheckGpuSharing(facts, /*mps_running=*/false).verdict, Verdict::kFail);
  EXPECT_EQ(CheckGpuSharing(facts, /*mps_running=*/true).verdict, Verdict::kOk);
  facts.gpus[0].compute_mode = ComputeMode::kProhibited;
  EXPECT_EQ(CheckGpuSharing(facts, /*mps_running=*/true).verdict, Verdict::kFail);
}

TEST(CheckGpuSharing, MemoryMustGoAsDescriptors) {
  DriverFacts facts = FakeDriver("h100");
  facts.gpus[0].shares_by_descriptor = false;
  const Check check = CheckGpuSharing(facts, false);
  EXPECT_EQ(check.verdict, Verdict::kFail);
  EXPECT_THAT(check.found, HasSubstr("file descriptor"));
}

// --- MPS ----------------------------------------------------------------------------------------

TEST(Mps, RunsWhereItsControlProcessDoes) {
  FakeRoot root;
  EXPECT_FALSE(FindMps(Machine(root.path()), "").running);
  EXPECT_FALSE(FindMps(Machine(root.path()), "").stale);
  root.Write("/tmp/nvidia-mps/nvidia-cuda-mps-control.pid", "4242");
  EXPECT_TRUE(FindMps(Machine(root.path()), "").stale);
  root.Write("/proc/4242/comm", "nvidia-cuda-mps");
  const MpsFacts facts = FindMps(Machine(root.path()), "");
  EXPECT_TRUE(facts.running);
  EXPECT_FALSE(facts.stale);
  EXPECT_EQ(facts.uid, geteuid());
  EXPECT_FALSE(FindMps(Machine(root.path()), "/other/pipe").running);
}

TEST(Mps, StaleFilesAndAnotherUsersServerAreWarnedOf) {
  EXPECT_EQ(CheckMps({}, /*has_gpu=*/false, {}).verdict, Verdict::kSkip);
  EXPECT_EQ(CheckMps({}, true, {}).verdict, Verdict::kOk);
  EXPECT_THAT(CheckMps({}, true, {}).advice, HasSubstr("nvidia-cuda-mps-control -d"));
  EXPECT_EQ(CheckMps({.stale = true}, true, {}).verdict, Verdict::kWarn);
  EXPECT_EQ(CheckMps({.running = true, .uid = 1000}, true, 1001).verdict, Verdict::kWarn);
  EXPECT_EQ(CheckMps({.running = true, .uid = 1000}, true, 1000).verdict, Verdict::kOk);
  EXPECT_EQ(CheckMps({.running = true, .uid = 0}, true, 1000).verdict, Verdict::kOk);
}

// --- Container toolkit --------------------------------------------------------------------------

TEST(Toolkit, TellsItsVersionByItsProgramOrThePackages) {
  FakeRoot root;
  EXPECT_EQ(ToolkitVersion(Machine(root.path())), "");
  root.Write("/var/lib/dpkg/status",
             "Package: nvidia-container-toolkit-base\nVersion: 9.9.9-1\n\n"
             "Package: nvidia-container-toolkit\nStatus: install ok installed\n"
             "Version: 1.16.1-1\n\nPackage: zip\nVersion: 3.0.1");
  EXPECT_EQ(ToolkitVersion(Machine(root.path())), "1.16.1");
  root.Program("/usr/bin/nvidia-ctk",
               "[ \"$1\" = --version ] && echo 'NVIDIA Container Toolkit CLI version 1.17.8' && "
               "echo 'commit: 8c2d4b5'");
  EXPECT_EQ(ToolkitVersion(Machine(root.path())), "1.17.8");
}

TEST(Toolkit, OneThatHangsOrFailsIsNotWaitedFor) {
  FakeRoot root;
  root.Program("/usr/bin/nvidia-ctk", "exec sleep 60");
  const absl::Time start = absl::Now();
  EXPECT_EQ(ToolkitVersion(Machine(root.path())), "");
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
}

TEST(Toolkit, EachVulnerabilityIsFoundUntilItsVersion) {
  const auto found = [](const char* version) { return CheckToolkit(version).found; };
  EXPECT_THAT(found("1.16.1"), AllOf(HasSubstr("CVE-2024-0132"), HasSubstr("CVE-2024-0133"),
                                     HasSubstr("CVE-2025-23359"), HasSubstr("CVE-2025-23266"),
                                     HasSubstr("CVE-2025-23267")));
  EXPECT_THAT(found("1.16.2"), AllOf(Not(HasSubstr("CVE-2024")), HasSubstr("CVE-2025-23359")));
  EXPECT_THAT(found("1.17.3"), HasSubstr("CVE-2025-23359"));
  EXPECT_THAT(found("1.17.4"),
              AllOf(Not(HasSubstr("CVE-2025-23359")), HasSubstr("CVE-2025-23266")));
  EXPECT_THAT(found("1.17.7"), HasSubstr("CVE-2025-23267"));
  EXPECT_EQ(CheckToolkit("1.17.7").verdict, Verdict::kFail);
  EXPECT_THAT(CheckToolkit("1.16.1").advice, HasSubstr("1.17.8"));
  for (const char* version : {"1.17.8", "1.18.0", "2.0.0"}) {
    EXPECT_EQ(CheckToolkit(version).verdict, Verdict::kOk) << version;
  }
  EXPECT_EQ(CheckToolkit("").verdict, Verdict::kSkip);
}

}  // namespace
}  // namespace clusterkv::client::ctl
