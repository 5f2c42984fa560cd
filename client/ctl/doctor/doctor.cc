#include "client/ctl/doctor/doctor.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "client/connection.h"
#include "client/ctl/doctor/daemon.h"
#include "client/ctl/doctor/driver.h"
#include "client/ctl/doctor/gpu_sharing.h"
#include "client/ctl/doctor/host_memory.h"
#include "client/ctl/doctor/kernel.h"
#include "client/ctl/doctor/memlock.h"
#include "client/ctl/doctor/mps.h"
#include "client/ctl/doctor/numa.h"
#include "client/ctl/doctor/sockets.h"
#include "client/ctl/doctor/toolkit.h"
#include "client/ctl/styled_line.h"
#include "client/ctl/terminal_text.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::ctl {
namespace {

constexpr char kUnixPrefix[] = "unix:";
constexpr size_t kNameColumns = 19;

const char* VerdictName(Verdict verdict) {
  switch (verdict) {
    case Verdict::kOk:
      return "ok";
    case Verdict::kWarn:
      return "warn";
    case Verdict::kFail:
      return "fail";
    case Verdict::kSkip:
      return "skip";
  }
  return "fail";
}

Style VerdictStyle(Verdict verdict) {
  switch (verdict) {
    case Verdict::kOk:
      return Style::kGood;
    case Verdict::kWarn:
      return Style::kWarning;
    case Verdict::kFail:
      return Style::kBad;
    case Verdict::kSkip:
      return Style::kQuiet;
  }
  return Style::kBad;
}

Check Skipped(const std::string& name, const std::string& why) {
  return {.name = name, .verdict = Verdict::kSkip, .found = why, .advice = {}};
}

absl::StatusOr<v1::GetStatusReply> AskDaemon(const DoctorOptions& options) {
  CKV_ASSIGN_OR_RETURN(const auto connection, Connection::Create(options.address));
  return connection->GetStatus({}, Deadline(options.timeout));
}

void AddSockets(const DoctorOptions& options, std::vector<Check>& checks) {
  for (const auto& [name, suffix] : {std::pair("gRPC socket", ""), {"attach socket", ".attach"}}) {
    if (options.preflight) {
      checks.push_back(Skipped(name, "no daemon is expected yet"));
    } else if (!options.address.starts_with(kUnixPrefix)) {
      checks.push_back(Skipped(name, "the address is no UNIX socket"));
    } else {
      checks.push_back(
          CheckSocket(name, ReadSocket(options.address.substr(sizeof(kUnixPrefix) - 1) + suffix)));
    }
  }
}

// The limits of the daemon that listens, or of this process.
Check Memlock(const Machine& machine, const std::optional<Peer>& daemon, uint64_t bytes,
              bool has_gpu) {
  if (daemon) {
    const auto limits = machine.Read(fmt::format("/proc/{}/limits", daemon->pid));
    if (limits) {
      return CheckMemlock(*limits, fmt::format("the daemon (pid {})", daemon->pid), bytes, has_gpu);
    }
  }
  return CheckMemlock(machine.Read("/proc/self/limits").value_or(""), "this shell", bytes, has_gpu);
}

size_t Count(const std::vector<Check>& checks, Verdict verdict) {
  return static_cast<size_t>(std::ranges::count(checks, verdict, &Check::verdict));
}

}  // namespace

std::vector<Check> RunDoctor(const Machine& machine, const DriverFacts& driver,
                             const DoctorOptions& options) {
  const std::vector<std::string> gpus = PciGpus(machine);
  const bool has_gpu = !driver.gpus.empty() || !gpus.empty();
  std::optional<Peer> daemon;
  absl::StatusOr<v1::GetStatusReply> status = absl::UnavailableError("no daemon is expected yet");
  if (!options.preflight) {
    status = AskDaemon(options);
    if (options.address.starts_with(kUnixPrefix)) {
      daemon = ListenerOf(options.address.substr(sizeof(kUnixPrefix) - 1));
    }
  }
  HostMemoryFacts memory = ReadHostMemory(machine, options.host_memory_dir);
  if (status.ok()) memory.taken_bytes = status->host_bytes().total();
  memory.wanted_bytes = options.host_memory_bytes;
  const MpsFacts mps = FindMps(machine, options.mps_pipe_directory);

  std::vector<Check> checks;
  checks.push_back(CheckDriver(driver, gpus));
  checks.push_back(CheckGpuSharing(driver, mps.running));
  checks.push_back(CheckMps(mps, has_gpu, daemon ? std::optional(daemon->uid) : std::nullopt));
  checks.push_back(CheckToolkit(ToolkitVersion(machine)));
  checks.push_back(
      Memlock(machine, daemon, std::max(memory.wanted_bytes, memory.taken_bytes), has_gpu));
  checks.push_back(CheckHostMemory(memory, has_gpu));
  checks.push_back(CheckHugePages(machine, memory));
  checks.push_back(CheckNuma(machine, gpus));
  checks.push_back(CheckKernel(ProbeKernel()));
  AddSockets(options, checks);
  checks.push_back(options.preflight ? Skipped("daemon", "none is expected yet")
                                     : CheckDaemon(status, options.version));
  return checks;
}

bool AnyFailed(const std::vector<Check>& checks) { return Count(checks, Verdict::kFail) > 0; }

std::string DoctorJson(const std::vector<Check>& checks) {
  using Json = nlohmann::ordered_json;
  Json list = Json::array();
  for (const Check& check : checks) {
    list.push_back({{"name", check.name},
                    {"verdict", VerdictName(check.verdict)},
                    {"found", check.found},
                    {"advice", check.advice}});
  }
  Json json{{"checks", std::move(list)}};
  for (const Verdict verdict : {Verdict::kOk, Verdict::kWarn, Verdict::kFail, Verdict::kSkip}) {
    json[VerdictName(verdict)] = Count(checks, verdict);
  }
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string DoctorTable(const std::vector<Check>& checks, bool colour) {
  std::string text;
  const auto add = [&](const StyledLine& line) {
    text += line.Render(std::string::npos, colour) + "\n";
  };
  for (const Check& check : checks) {
    StyledLine line(fmt::format("{:<6}", VerdictName(check.verdict)), VerdictStyle(check.verdict));
    line.Add(fmt::format("{:<{}}", check.name, kNameColumns), Style::kBold);
    add(line.Add(Printable(check.found)));
    if (!check.advice.empty()) {
      add(StyledLine(std::string(6 + kNameColumns, ' ')).Add("-> " + Printable(check.advice)));
    }
  }
  return text + fmt::format("{} ok, {} to think about, {} failed, {} skipped\n",
                            Count(checks, Verdict::kOk), Count(checks, Verdict::kWarn),
                            Count(checks, Verdict::kFail), Count(checks, Verdict::kSkip));
}

}  // namespace clusterkv::client::ctl
