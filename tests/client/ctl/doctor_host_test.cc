// What the doctor says of memory, NUMA, kernel, sockets and the daemon.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "client/ctl/doctor/daemon.h"
#include "client/ctl/doctor/host_memory.h"
#include "client/ctl/doctor/kernel.h"
#include "client/ctl/doctor/memlock.h"
#include "client/ctl/doctor/mounts.h"
#include "client/ctl/doctor/numa.h"
#include "client/ctl/doctor/sockets.h"
#include "gpu/unique_fd.h"
#include "tests/client/ctl/fake_root.h"

namespace clusterkv::client::ctl {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

constexpr uint64_t kGiB = uint64_t{1} << 30;

// --- Mounts -------------------------------------------------------------------------------------

constexpr char kMounts[] =
    "22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    "23 22 0:21 / /dev/shm rw,nosuid shared:2 master:1 - tmpfs tmpfs rw,size=8g,huge=advise\n"
    "24 22 0:22 / /dev/shmem rw - tmpfs other rw\n"
    "25 22 0:23 / /mnt/a\\040b rw - hugetlbfs none rw,pagesize=2M";

TEST(MountOf, IsTheNearestAbove) {
  FakeRoot root;
  root.Write("/proc/self/mountinfo", kMounts);
  const Machine machine(root.path());
  EXPECT_EQ(MountOf(machine, "/dev/shm/clusterkv")->point, "/dev/shm");
  EXPECT_EQ(MountOf(machine, "/dev/shm")->type, "tmpfs");
  EXPECT_EQ(MountOf(machine, "/dev/shm/x")->options, "rw,size=8g,huge=advise");
  EXPECT_EQ(MountOf(machine, "/dev/shmem/x")->point, "/dev/shmem");
  EXPECT_EQ(MountOf(machine, "/var/lib")->type, "ext4");
  EXPECT_EQ(MountOf(machine, "/mnt/a b/kv")->type, "hugetlbfs");
  EXPECT_EQ(MountOf(Machine("/nonexistent"), "/x"), std::nullopt);
}

// --- Host memory --------------------------------------------------------------------------------

HostMemoryFacts OnTmpfs() {
  HostMemoryFacts facts;
  facts.directory = "/dev/shm/clusterkv";
  facts.mount = Mount{.point = "/dev/shm", .type = "tmpfs", .options = "rw"};
  facts.use = FileSystemUse{.total_bytes = 64 * kGiB, .free_bytes = 60 * kGiB};
  facts.available_bytes = 100 * kGiB;
  return facts;
}

TEST(CheckHostMemory, AsksForTmpfs) {
  EXPECT_EQ(CheckHostMemory(OnTmpfs(), true).verdict, Verdict::kOk);
  HostMemoryFacts facts = OnTmpfs();
  facts.mount->type = "ext4";
  EXPECT_EQ(CheckHostMemory(facts, /*needs_tmpfs=*/true).verdict, Verdict::kFail);
  EXPECT_EQ(CheckHostMemory(facts, /*needs_tmpfs=*/false).verdict, Verdict::kWarn);
  facts.mount = std::nullopt;
  EXPECT_EQ(CheckHostMemory(facts, true).verdict, Verdict::kWarn);
}

TEST(CheckHostMemory, LooksForRoomInTheFileSystemTheCgroupAndTheMachine) {
  HostMemoryFacts facts = OnTmpfs();
  facts.wanted_bytes = 60 * kGiB;
  EXPECT_EQ(CheckHostMemory(facts, true).verdict, Verdict::kOk);
  facts.wanted_bytes = 61 * kGiB;
  EXPECT_EQ(CheckHostMemory(facts, true).verdict, Verdict::kFail);
  EXPECT_THAT(CheckHostMemory(facts, true).found, HasSubstr("/dev/shm has 60.0 GiB free"));
  facts.wanted_bytes = 10 * kGiB;
  facts.cgroup_left_bytes = 9 * kGiB;
  EXPECT_THAT(CheckHostMemory(facts, true).found, HasSubstr("cgroup's limit leaves 9.0 GiB"));
  facts.cgroup_left_bytes = 10 * kGiB;
  EXPECT_EQ(CheckHostMemory(facts, true).verdict, Verdict::kOk);
  facts.available_bytes = 5 * kGiB;
  EXPECT_EQ(CheckHostMemory(facts, true).verdict, Verdict::kFail);
  EXPECT_THAT(CheckHostMemory(facts, true).found, HasSubstr("machine has 5.0 GiB available"));
}

TEST(ReadHostMemory, TakesTheTightestCgroup) {
  FakeRoot root;
  root.Write("/proc/self/mountinfo", kMounts)
      .Write("/proc/meminfo", "MemTotal: 2000 kB\nMemAvailable:    1000 kB")
      .Write("/proc/self/cgroup", "0::/kubepods/pod1/worker")
      .Write("/sys/fs/cgroup/kubepods/pod1/worker/memory.max", "max")
      .Write("/sys/fs/cgroup/kubepods/pod1/worker/memory.current", "10")
      .Write("/sys/fs/cgroup/kubepods/pod1/memory.max", "5000")
      .Write("/sys/fs/cgroup/kubepods/pod1/memory.current", "1000")
      .Write("/sys/fs/cgroup/kubepods/memory.max", "9000")
      .Write("/sys/fs/cgroup/kubepods/memory.current", "8000");
  const HostMemoryFacts facts = ReadHostMemory(Machine(root.path()), "/dev/shm/clusterkv");
  EXPECT_EQ(facts.cgroup_left_bytes, 1000u);
  EXPECT_EQ(facts.available_bytes, 1024'000u);
  EXPECT_EQ(facts.mount->point, "/dev/shm");
  EXPECT_FALSE(facts.use.has_value());  // there is no such folder below the root
  root.Write("/proc/self/cgroup", "0::/");
  EXPECT_EQ(ReadHostMemory(Machine(root.path()), "/x").cgroup_left_bytes, std::nullopt);
}

TEST(ReadHostMemory, AsksTheFileSystemItself) {
  const HostMemoryFacts facts = ReadHostMemory(Machine(), "/dev/shm/clusterkv");
  ASSERT_TRUE(facts.mount && facts.use);
  EXPECT_GT(facts.use->total_bytes, 0u);
  EXPECT_LE(facts.use->free_bytes, facts.use->total_bytes);
}

// --- Huge pages ---------------------------------------------------------------------------------

TEST(CheckHugePages, LooksAtTheMountAndTheKernelsSwitch) {
  FakeRoot root;
  constexpr char kSwitch[] = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
  root.Write(kSwitch, "always within_size advise [never] deny force");
  const Machine machine(root.path());
  HostMemoryFacts facts = OnTmpfs();
  EXPECT_EQ(CheckHugePages(machine, facts).verdict, Verdict::kWarn);
  EXPECT_THAT(CheckHugePages(machine, facts).advice, HasSubstr("huge=within_size /dev/shm"));
  facts.mount->options = "rw,size=8g,huge=within_size";
  EXPECT_EQ(CheckHugePages(machine, facts).verdict, Verdict::kOk);
  root.Write(kSwitch, "always within_size advise never [deny] force");
  EXPECT_EQ(CheckHugePages(machine, facts).verdict, Verdict::kWarn);
  root.Write(kSwitch, "always within_size advise never deny [force]");
  facts.mount->options = "rw";
  EXPECT_EQ(CheckHugePages(machine, facts).verdict, Verdict::kOk);
  facts.mount->type = "ext4";
  EXPECT_EQ(CheckHugePages(machine, facts).verdict, Verdict::kSkip);
}

TEST(CheckHugePages, CountsReservedOnes) {
  FakeRoot root;
  root.Write("/proc/meminfo", "HugePages_Total: 100\nHugePages_Free: 50\nHugepagesize: 2048 kB");
  HostMemoryFacts facts = OnTmpfs();
  facts.mount->type = "hugetlbfs";
  facts.wanted_bytes = 100 << 20;
  EXPECT_EQ(CheckHugePages(Machine(root.path()), facts).verdict, Verdict::kOk);
  facts.wanted_bytes = (100 << 20) + 1;
  const Check check = CheckHugePages(Machine(root.path()), facts);
  EXPECT_EQ(check.verdict, Verdict::kFail);
  EXPECT_THAT(check.advice, HasSubstr("vm.nr_hugepages=51"));
}

// --- memlock ------------------------------------------------------------------------------------

TEST(CheckMemlock, ComparesTheSoftLimitWithThePool) {
  const std::string limits =
      "Limit                     Soft Limit           Hard Limit           Units     \n"
      "Max cpu time              unlimited            unlimited            seconds   \n"
      "Max locked memory         8388608              unlimited            bytes     \n";
  EXPECT_EQ(CheckMemlock(limits, "me", 8 << 20, true).verdict, Verdict::kOk);
  const Check low = CheckMemlock(limits, "the daemon (pid 7)", kGiB, true);
  EXPECT_EQ(low.verdict, Verdict::kWarn);
  EXPECT_THAT(low.found, AllOf(HasSubstr("8.0 MiB for the daemon (pid 7)"), HasSubstr("1.0 GiB")));
  EXPECT_EQ(CheckMemlock(limits, "me", kGiB, /*has_gpu=*/false).verdict, Verdict::kOk);
  EXPECT_EQ(CheckMemlock("Max locked memory unlimited unlimited bytes", "me", kGiB, true).verdict,
            Verdict::kOk);
  EXPECT_EQ(CheckMemlock("", "me", 0, true).verdict, Verdict::kSkip);
}

// --- NUMA ---------------------------------------------------------------------------------------

TEST(CheckNuma, WarnsOfAGpuWhoseMemoryIsFar) {
  FakeRoot root;
  const Machine machine(root.path());
  EXPECT_EQ(CheckNuma(machine, {}).verdict, Verdict::kSkip);
  root.Write("/sys/devices/system/node/online", "0");
  EXPECT_EQ(CheckNuma(machine, {}).found, "one node");
  root.Write("/sys/devices/system/node/online", "0-1")
      .Write("/proc/self/status", "Name:\tx\nMems_allowed:\t3\nMems_allowed_list:\t0-1")
      .Gpu("0000:65:00.0", "1")
      .Gpu("0000:17:00.0", "-1");
  const Check near = CheckNuma(machine, {"0000:65:00.0", "0000:17:00.0"});
  EXPECT_EQ(near.verdict, Verdict::kOk);
  EXPECT_THAT(near.found, AllOf(HasSubstr("GPU 0000:65:00.0 on node 1"),
                                HasSubstr("GPU 0000:17:00.0 on an unknown node")));
  root.Write("/proc/self/status", "Mems_allowed_list:\t0");
  const Check far = CheckNuma(machine, {"0000:65:00.0"});
  EXPECT_EQ(far.verdict, Verdict::kWarn);
  EXPECT_THAT(far.advice, HasSubstr("node 1"));
}

// --- Kernel -------------------------------------------------------------------------------------

TEST(CheckKernel, NamesTheFallback) {
  EXPECT_EQ(CheckKernel({.release = "6.8.0", .pidfd = true, .peer_pidfd = true}).verdict,
            Verdict::kOk);
  const Check old = CheckKernel({.release = "6.1.0", .pidfd = true, .peer_pidfd = false});
  EXPECT_EQ(old.verdict, Verdict::kWarn);
  EXPECT_THAT(old.found, AllOf(HasSubstr("6.1.0"), HasSubstr("lifeline")));
}

TEST(ProbeKernel, TriesIt) {
  const KernelFacts facts = ProbeKernel();
  EXPECT_FALSE(facts.release.empty());
  EXPECT_TRUE(facts.pidfd || !facts.peer_pidfd);  // the older of the two
}

// --- Sockets ------------------------------------------------------------------------------------

gpu::UniqueFd Listen(const std::string& path) {
  gpu::UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  EXPECT_EQ(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  EXPECT_EQ(listen(fd.get(), 1), 0);
  return fd;
}

TEST(Sockets, AreJudgedByTheirRights) {
  FakeRoot root;
  const std::string path = root.path() + "/s.sock";
  EXPECT_EQ(CheckSocket("gRPC socket", ReadSocket(path)).verdict, Verdict::kFail);
  EXPECT_THAT(CheckSocket("gRPC socket", ReadSocket(path)).advice, HasSubstr("start clusterkvd"));
  const gpu::UniqueFd listening = Listen(path);
  ASSERT_EQ(chmod(path.c_str(), 0660), 0);
  EXPECT_EQ(CheckSocket("gRPC socket", ReadSocket(path)).verdict, Verdict::kOk);
  ASSERT_EQ(chmod(path.c_str(), 0666), 0);
  EXPECT_EQ(CheckSocket("gRPC socket", ReadSocket(path)).verdict, Verdict::kWarn);
  SocketFacts facts = ReadSocket(path);
  facts.mode = 0660;
  facts.group = "clusterkv";
  facts.writable = false;
  const Check foreign = CheckSocket("gRPC socket", facts);
  EXPECT_EQ(foreign.verdict, Verdict::kFail);
  EXPECT_THAT(foreign.advice, HasSubstr("group clusterkv"));
  EXPECT_THAT(foreign.found, HasSubstr("not for uid"));
  root.Write("/file", "x");
  EXPECT_THAT(CheckSocket("gRPC socket", ReadSocket(root.path() + "/file")).found,
              HasSubstr("is no socket"));
  EXPECT_FALSE(ReadSocket(root.path() + "/file/below").problem.empty());
}

TEST(ListenerOf, IsTheProcessThatListens) {
  FakeRoot root;
  const std::string path = root.path() + "/s.sock";
  EXPECT_FALSE(ListenerOf(path).has_value());
  const gpu::UniqueFd listening = Listen(path);
  const auto peer = ListenerOf(path);
  ASSERT_TRUE(peer.has_value());
  EXPECT_EQ(peer->pid, getpid());
  EXPECT_EQ(peer->uid, geteuid());
  EXPECT_FALSE(ListenerOf(std::string(200, 'x')).has_value());
}

// --- Daemon -------------------------------------------------------------------------------------

TEST(CheckDaemon, AsksForReadinessAndTheSameVersion) {
  EXPECT_EQ(CheckDaemon(absl::UnavailableError("no one there"), "1.0.0").verdict, Verdict::kFail);
  v1::GetStatusReply status;
  status.set_version("1.0.0");
  status.set_backend("host");
  status.set_not_ready_reason("draining");
  EXPECT_EQ(CheckDaemon(status, "1.0.0").verdict, Verdict::kFail);
  EXPECT_THAT(CheckDaemon(status, "1.0.0").found, HasSubstr("not ready: draining"));
  status.set_ready(true);
  EXPECT_EQ(CheckDaemon(status, "1.0.0").verdict, Verdict::kOk);
  EXPECT_EQ(CheckDaemon(status, "1.0.1").verdict, Verdict::kWarn);
  EXPECT_THAT(CheckDaemon(status, "1.0.1").advice, Not(testing::IsEmpty()));
}

}  // namespace
}  // namespace clusterkv::client::ctl
