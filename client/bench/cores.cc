#include "client/bench/cores.h"

#include <sched.h>

#include <algorithm>

namespace clusterkv::client::bench {

int UsableCores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return 1;
}

}  // namespace clusterkv::client::bench
