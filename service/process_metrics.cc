#include "service/process_metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <ctime>
#include <fstream>
#include <sstream>
#include <string>

#include "service/metric_sections.h"

namespace clusterkv::service {
namespace {

double Seconds(const timeval& time) {
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
}

// Entries of /proc/self/fd, but for . and .., and the descriptor that reads it.
uint64_t CountOpenFds() {
  DIR* const directory = opendir("/proc/self/fd");
  if (directory == nullptr) return 0;
  uint64_t entries = 0;
  while (readdir(directory) != nullptr) ++entries;
  closedir(directory);
  return entries - 3;
}

// Threads, virtual bytes and the start are in one line of the kernel's, after the name in brackets.
void ReadStat(ProcessUse& use) {
  std::string line;
  std::getline(std::ifstream("/proc/self/stat"), line);
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return;
  std::istringstream fields(line.substr(name_end + 1));
  std::string skipped;
  constexpr int kThreads = 20, kStart = 22, kVirtual = 23;  // proc(5) counts from 1, the name is 2
  for (int field = 3; field <= kVirtual; ++field) {
    if (field == kThreads) {
      fields >> use.threads;
    } else if (field == kVirtual) {
      fields >> use.virtual_bytes;
    } else if (field == kStart) {
      uint64_t ticks = 0;
      fields >> ticks;
      timespec boot{}, now{};
      clock_gettime(CLOCK_BOOTTIME, &boot);
      clock_gettime(CLOCK_REALTIME, &now);
      const auto seconds = [](const timespec& time) {
        return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
      };
      use.start_seconds = seconds(now) - seconds(boot) +
                          static_cast<double>(ticks) / static_cast<double>(sysconf(_SC_CLK_TCK));
    } else {
      fields >> skipped;
    }
  }
}

}  // namespace

ProcessUse ReadProcessUse() {
  ProcessUse use;
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    use.cpu_seconds = Seconds(usage.ru_utime) + Seconds(usage.ru_stime);
  }
  uint64_t total_pages = 0, resident_pages = 0;
  if (std::ifstream("/proc/self/statm") >> total_pages >> resident_pages) {
    use.resident_bytes = resident_pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  }
  ReadStat(use);
  use.open_fds = CountOpenFds();
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) use.max_fds = limit.rlim_cur;
  return use;
}

void AddProcessMetrics(MetricFamilies& families) {
  // The clocks that the start comes from drift against each other; it must not.
  static const double start_seconds = ReadProcessUse().start_seconds;
  const ProcessUse use = ReadProcessUse();
  families.Counter("process_cpu_seconds_total", "User and system CPU time.", use.cpu_seconds);
  families.Gauge("process_resident_memory_bytes", "Resident memory, the host pool among it.",
                 use.resident_bytes);
  families.Gauge("process_virtual_memory_bytes", "Virtual memory.", use.virtual_bytes);
  families.Gauge("process_open_fds", "Open file descriptors.", use.open_fds);
  families.Gauge("process_max_fds", "Most file descriptors that may be open.", use.max_fds);
  families.Gauge("process_threads", "Threads.", use.threads);
  families.Gauge("process_start_time_seconds", "Start of the process, since the epoch.",
                 start_seconds);
}

}  // namespace clusterkv::service
