#include "client/ctl/doctor/host_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "client/ctl/terminal_text.h"

namespace clusterkv::client::ctl {
namespace {

std::string Bytes(uint64_t bytes) { return BytesText(static_cast<double>(bytes)); }

std::optional<uint64_t> Number(const std::optional<std::string>& text) {
  uint64_t number = 0;
  if (!text || !absl::SimpleAtoi(*text, &number)) return std::nullopt;
  return number;
}

// A line "Name:   12 kB" of /proc/meminfo, in bytes; "Name: 12" as it stands.
std::optional<uint64_t> MemInfo(const Machine& machine, const std::string& name) {
  std::istringstream file(machine.Read("/proc/meminfo").value_or(""));
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(name + ":")) continue;
    std::istringstream words(line.substr(name.size() + 1));
    uint64_t value = 0;
    std::string unit;
    if (!(words >> value)) return std::nullopt;
    return words >> unit && unit == "kB" ? value * 1024 : value;
  }
  return std::nullopt;
}

// What the tightest limit of cgroup v2 on this process leaves. Pages of a tmpfs count where they
// are taken.
std::optional<uint64_t> CgroupLeft(const Machine& machine) {
  std::istringstream file(machine.Read("/proc/self/cgroup").value_or(""));
  std::string path;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("0::/")) path = line.substr(3);
  }
  std::optional<uint64_t> left;
  for (size_t end = path.size(); end > 0; end = path.rfind('/', end - 1)) {
    const std::string folder = fmt::format("/sys/fs/cgroup{}", path.substr(0, end));
    const auto most = Number(machine.Read(folder + "/memory.max"));
    const auto used = Number(machine.Read(folder + "/memory.current"));
    if (most && used) left = std::min(left.value_or(UINT64_MAX), *most - std::min(*most, *used));
  }
  return left;
}

std::optional<std::string> Option(const std::string& options, const std::string& name) {
  for (const std::string& option : std::vector<std::string>(absl::StrSplit(options, ','))) {
    if (option.starts_with(name + "=")) return option.substr(name.size() + 1);
  }
  return std::nullopt;
}

// "always [advise] never": the word in brackets.
std::string Chosen(const std::string& text) {
  const size_t open = text.find('[');
  const size_t close = text.find(']');
  if (open == std::string::npos || close == std::string::npos || close < open) return text;
  return text.substr(open + 1, close - open - 1);
}

bool InMemory(const Mount& mount) { return mount.type == "tmpfs" || mount.type == "hugetlbfs"; }

// What keeps `bytes` from being taken now; empty: nothing.
std::string Lack(const HostMemoryFacts& facts, uint64_t bytes) {
  if (facts.use && facts.use->free_bytes < bytes) {
    return fmt::format("{} has {} free of {}", facts.mount ? facts.mount->point : facts.directory,
                       Bytes(facts.use->free_bytes), Bytes(facts.use->total_bytes));
  }
  const bool pages = facts.mount && facts.mount->type == "tmpfs";
  if (pages && facts.cgroup_left_bytes && *facts.cgroup_left_bytes < bytes) {
    return fmt::format("this cgroup's limit leaves {}", Bytes(*facts.cgroup_left_bytes));
  }
  if (pages && facts.available_bytes && *facts.available_bytes < bytes) {
    return fmt::format("the machine has {} available", Bytes(*facts.available_bytes));
  }
  return {};
}

}  // namespace

HostMemoryFacts ReadHostMemory(const Machine& machine, const std::string& directory) {
  HostMemoryFacts facts;
  facts.directory = directory;
  facts.mount = MountOf(machine, directory);
  if (facts.mount) facts.use = UseOf(machine.Path(facts.mount->point));
  facts.available_bytes = MemInfo(machine, "MemAvailable");
  facts.cgroup_left_bytes = CgroupLeft(machine);
  return facts;
}

Check CheckHostMemory(const HostMemoryFacts& facts, bool needs_tmpfs) {
  Check check{.name = "host memory", .verdict = Verdict::kOk, .found = {}, .advice = {}};
  if (!facts.mount) {
    check.verdict = Verdict::kWarn;
    check.found = fmt::format("{}: its file system is unknown", facts.directory);
    check.advice = "choose a folder on tmpfs with --host-memory-dir";
    return check;
  }
  check.found = fmt::format("{} on {} {}", facts.directory, facts.mount->type, facts.mount->point);
  if (facts.use) {
    check.found +=
        fmt::format(", {} free of {}", Bytes(facts.use->free_bytes), Bytes(facts.use->total_bytes));
  }
  if (facts.taken_bytes > 0) {
    check.found += fmt::format("; the daemon holds {}", Bytes(facts.taken_bytes));
  }
  if (!InMemory(*facts.mount)) {
    check.verdict = needs_tmpfs ? Verdict::kFail : Verdict::kWarn;
    check.advice = fmt::format("put --host-memory-dir on tmpfs{}: {} writes pages back to a disk",
                               needs_tmpfs ? " or hugetlbfs, which the cuda backend needs" : "",
                               facts.mount->type);
    return check;
  }
  const std::string lack = facts.wanted_bytes > 0 ? Lack(facts, facts.wanted_bytes) : "";
  if (!lack.empty()) {
    check.verdict = Verdict::kFail;
    check.found += fmt::format("; {} are wanted, and {}", Bytes(facts.wanted_bytes), lack);
    check.advice =
        "a smaller --host-memory, or more room: mount -o remount,size=... ; docker --shm-size; in "
        "Kubernetes an emptyDir with medium Memory and a memory limit that holds it";
  }
  return check;
}

Check CheckHugePages(const Machine& machine, const HostMemoryFacts& facts) {
  Check check{.name = "huge pages", .verdict = Verdict::kOk, .found = {}, .advice = {}};
  if (!facts.mount || !InMemory(*facts.mount)) {
    check.verdict = Verdict::kSkip;
    check.found = "the host memory is not on tmpfs or hugetlbfs";
    return check;
  }
  if (facts.mount->type == "hugetlbfs") {
    const uint64_t pages = MemInfo(machine, "HugePages_Free").value_or(0);
    const uint64_t size = MemInfo(machine, "Hugepagesize").value_or(0);
    check.found = fmt::format("hugetlbfs, {} of reserved pages free", Bytes(pages * size));
    if (facts.wanted_bytes > pages * size) {
      check.verdict = Verdict::kFail;
      check.found += fmt::format("; {} are wanted", Bytes(facts.wanted_bytes));
      check.advice = fmt::format("sysctl vm.nr_hugepages={}",
                                 size == 0 ? 0 : (facts.wanted_bytes + size - 1) / size);
    }
    return check;
  }
  const std::string all =
      Chosen(machine.Read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").value_or("never"));
  const std::string mounted = Option(facts.mount->options, "huge").value_or("never");
  if (all == "force" || (all != "deny" && mounted != "never")) {
    check.found = fmt::format("tmpfs {} with huge={}", facts.mount->point,
                              all == "force" ? "always (forced)" : mounted);
    return check;
  }
  check.verdict = Verdict::kWarn;
  check.found = fmt::format("tmpfs {} has small pages ({})", facts.mount->point,
                            all == "deny" ? "shmem_enabled is deny" : "huge=" + mounted);
  check.advice =
      all == "deny"
          ? "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled, then mount with huge="
          : fmt::format("optional, for faster pinning: mount -o remount,huge=within_size {}",
                        facts.mount->point);
  return check;
}

}  // namespace clusterkv::client::ctl
