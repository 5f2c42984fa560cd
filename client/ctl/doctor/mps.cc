#include "client/ctl/doctor/mps.h"

#include <fmt/format.h>
#include <sys/stat.h>

namespace clusterkv::client::ctl {

MpsFacts FindMps(const Machine& machine, const std::string& pipe_directory) {
  MpsFacts facts;
  facts.pipe_directory = pipe_directory.empty() ? "/tmp/nvidia-mps" : pipe_directory;
  const auto pid = machine.Read(facts.pipe_directory + "/nvidia-cuda-mps-control.pid");
  if (!pid && !machine.Exists(facts.pipe_directory + "/control")) return facts;
  const std::string process = "/proc/" + pid.value_or("none");
  facts.running = pid && !pid->empty() && machine.Exists(process);
  facts.stale = !facts.running;
  struct stat info {};
  if (facts.running && stat(machine.Path(process).c_str(), &info) == 0) facts.uid = info.st_uid;
  return facts;
}

Check CheckMps(const MpsFacts& mps, bool has_gpu, std::optional<uint32_t> daemon_uid) {
  Check check{.name = "MPS", .verdict = Verdict::kOk, .found = {}, .advice = {}};
  if (!has_gpu) {
    check.verdict = Verdict::kSkip;
    check.found = "no GPU to share";
  } else if (mps.stale) {
    check.verdict = Verdict::kWarn;
    check.found = fmt::format("{} is there, its server is not: CUDA programs will fail to start",
                              mps.pipe_directory);
    check.advice = "start nvidia-cuda-mps-control -d, or remove the folder";
  } else if (!mps.running) {
    check.found = "not running: daemon and workers share the GPU by time slices";
    check.advice =
        "optional: under MPS a busy daemon costs a worker's step under 1 %, not 16 % "
        "(nvidia-cuda-mps-control -d); a fault of one client can then end the others";
  } else if (mps.uid && *mps.uid != 0 && daemon_uid && *mps.uid != *daemon_uid) {
    check.verdict = Verdict::kWarn;
    check.found = fmt::format("runs for uid {}, the daemon has uid {}", *mps.uid, *daemon_uid);
    check.advice = "MPS serves one uid: run it as root, or all as one user";
  } else {
    check.found = fmt::format("runs at {}", mps.pipe_directory);
  }
  return check;
}

}  // namespace clusterkv::client::ctl
