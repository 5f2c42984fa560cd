#include "client/ctl/doctor/toolkit.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"

namespace clusterkv::client::ctl {
namespace {

constexpr const char* kPrograms[] = {
    "/usr/bin/nvidia-ctk", "/usr/local/bin/nvidia-ctk", "/usr/bin/nvidia-container-toolkit",
    "/usr/local/nvidia/toolkit/nvidia-ctk"};  // the last: as the GPU operator installs it

using Version = std::array<int, 3>;

struct Vulnerability {
  const char* id;
  const char* what;
  Version fixed;
};
// NVIDIA's security bulletins; the first version without it.
constexpr Vulnerability kVulnerabilities[] = {
    {"CVE-2024-0132", "container escape", {1, 16, 2}},
    {"CVE-2024-0133", "files made on the host", {1, 16, 2}},
    {"CVE-2025-23359", "container escape", {1, 17, 4}},
    {"CVE-2025-23266", "code as root on the host", {1, 17, 8}},
    {"CVE-2025-23267", "files changed on the host", {1, 17, 8}},
};

// The first "a.b.c" in a text.
std::optional<Version> FindVersion(const std::string& text) {
  for (size_t at = text.find_first_of("0123456789"); at != std::string::npos;
       at = text.find_first_of("0123456789", at)) {
    size_t end = at;
    Version version{};
    size_t parts = 0;
    while (parts < version.size()) {
      const size_t stop = text.find_first_not_of("0123456789", end);
      const std::string digits = text.substr(end, stop == std::string::npos ? stop : stop - end);
      if (digits.empty() || !absl::SimpleAtoi(digits, &version[parts])) break;
      ++parts;
      end = stop == std::string::npos ? text.size() : stop;
      if (parts == version.size() || end >= text.size() || text[end] != '.') break;
      ++end;
    }
    if (parts == version.size()) return version;
    at = std::max(end, at + 1);
  }
  return std::nullopt;
}

std::string Text(const Version& version) { return absl::StrJoin(version, "."); }

std::string DpkgVersion(const Machine& machine) {
  std::istringstream database(machine.Read("/var/lib/dpkg/status").value_or(""));
  bool package = false;
  for (std::string line; std::getline(database, line);) {
    if (line.starts_with("Package: ")) package = line == "Package: nvidia-container-toolkit";
    if (package && line.starts_with("Version: ")) return line.substr(9);
  }
  return {};
}

}  // namespace

std::string ToolkitVersion(const Machine& machine) {
  for (const char* program : kPrograms) {
    const auto found = FindVersion(machine.VersionOf(program).value_or(""));
    if (found) return Text(*found);
  }
  const auto found = FindVersion(DpkgVersion(machine));
  return found ? Text(*found) : std::string();
}

Check CheckToolkit(const std::string& version) {
  Check check{.name = "container toolkit", .verdict = Verdict::kSkip, .found = {}, .advice = {}};
  const auto found = FindVersion(version);
  if (!found) {
    check.found = "not installed here; inside a container ask on the node";
    return check;
  }
  std::vector<std::string> open;
  Version needed = *found;
  for (const Vulnerability& known : kVulnerabilities) {
    if (*found >= known.fixed) continue;
    open.push_back(fmt::format("{} ({})", known.id, known.what));
    needed = std::max(needed, known.fixed);
  }
  check.verdict = open.empty() ? Verdict::kOk : Verdict::kFail;
  check.found =
      fmt::format("{}: {}", Text(*found),
                  open.empty() ? "none of the known vulnerabilities" : absl::StrJoin(open, ", "));
  if (!open.empty()) {
    check.advice = fmt::format(
        "update nvidia-container-toolkit (or the GPU operator's) to {} or "
        "later",
        Text(needed));
  }
  return check;
}

}  // namespace clusterkv::client::ctl
