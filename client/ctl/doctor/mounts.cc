#include "client/ctl/doctor/mounts.h"

#include <sys/statvfs.h>

#include <sstream>
#include <vector>

#include "absl/strings/str_split.h"

namespace clusterkv::client::ctl {
namespace {

// mountinfo writes blanks and the like as \040.
std::string Unescaped(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto digit = [&](size_t at) { return text[at] >= '0' && text[at] <= '7'; };
    if (text[i] == '\\' && i + 3 < text.size() && digit(i + 1) && digit(i + 2) && digit(i + 3)) {
      plain += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 +
                                 (text[i + 3] - '0'));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

bool Holds(const std::string& point, const std::string& path) {
  if (point == "/" || path == point) return true;
  return path.starts_with(point) && path[point.size()] == '/';
}

}  // namespace

std::optional<Mount> MountOf(const Machine& machine, const std::string& path) {
  std::istringstream list(machine.Read("/proc/self/mountinfo").value_or(""));
  std::optional<Mount> found;
  for (std::string line; std::getline(list, line);) {
    // id parent device root point options [tags...] - type source super-options
    const std::vector<std::string> words = absl::StrSplit(line, ' ');
    size_t dash = 6;
    while (dash < words.size() && words[dash] != "-") ++dash;
    if (dash + 3 >= words.size()) continue;
    const std::string point = Unescaped(words[4]);
    // Of two on one point the later one covers the earlier.
    if (!Holds(point, path) || (found && point.size() < found->point.size())) continue;
    found = Mount{.point = point, .type = words[dash + 1], .options = words[dash + 3]};
  }
  return found;
}

std::optional<FileSystemUse> UseOf(const std::string& path) {
  struct statvfs use {};
  if (statvfs(path.c_str(), &use) != 0) return std::nullopt;
  return FileSystemUse{.total_bytes = use.f_blocks * use.f_frsize,
                       .free_bytes = use.f_bavail * use.f_frsize};
}

}  // namespace clusterkv::client::ctl
