// `clusterkvctl doctor`: is this machine fit for a daemon and its workers?
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "client/ctl/doctor/check.h"
#include "client/ctl/doctor/driver_probe.h"
#include "client/ctl/doctor/machine.h"

namespace clusterkv::client::ctl {

struct DoctorOptions {
  std::string address = {};                   // unix:PATH or HOST:PORT
  absl::Duration timeout = absl::Seconds(5);  // of the daemon's answer
  std::string host_memory_dir = "/dev/shm/clusterkv";
  uint64_t host_memory_bytes = 0;       // of the daemon to be started; 0: not asked
  bool preflight = false;               // no daemon is expected yet
  std::string version = {};             // of this program
  std::string mps_pipe_directory = {};  // empty: CUDA's own choice
};

std::vector<Check> RunDoctor(const Machine& machine, const DriverFacts& driver,
                             const DoctorOptions& options);

bool AnyFailed(const std::vector<Check>& checks);
// {"checks":[{"name","verdict","found","advice"}],"ok","warn","fail","skip"}
std::string DoctorJson(const std::vector<Check>& checks);
std::string DoctorTable(const std::vector<Check>& checks, bool colour);

}  // namespace clusterkv::client::ctl
