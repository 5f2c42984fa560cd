#include "client/ctl/doctor/sockets.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <grp.h>
#include <pwd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "gpu/unique_fd.h"

namespace clusterkv::client::ctl {
namespace {

std::string UserName(uid_t uid) {
  const passwd* const entry = getpwuid(uid);
  return entry != nullptr ? entry->pw_name : std::to_string(uid);
}

std::string GroupName(gid_t gid) {
  const group* const entry = getgrgid(gid);
  return entry != nullptr ? entry->gr_name : std::to_string(gid);
}

std::string Me() {
  std::string text = fmt::format("uid {}, groups {}", geteuid(), getegid());
  std::vector<gid_t> groups(static_cast<size_t>(std::max(0, getgroups(0, nullptr))));
  const int count = getgroups(static_cast<int>(groups.size()), groups.data());
  for (int i = 0; i < count; ++i) {
    if (groups[static_cast<size_t>(i)] != getegid()) {
      text += fmt::format(" {}", groups[static_cast<size_t>(i)]);
    }
  }
  return text;
}

}  // namespace

SocketFacts ReadSocket(const std::string& path) {
  SocketFacts facts;
  facts.path = path;
  facts.me = Me();
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) {
    if (errno != ENOENT) facts.problem = std::strerror(errno);
    return facts;
  }
  facts.exists = true;
  facts.is_socket = S_ISSOCK(info.st_mode);
  facts.mode = info.st_mode & 07777;
  facts.owner = UserName(info.st_uid);
  facts.group = GroupName(info.st_gid);
  facts.writable = faccessat(AT_FDCWD, path.c_str(), W_OK, AT_EACCESS) == 0;
  return facts;
}

Check CheckSocket(const std::string& name, const SocketFacts& facts) {
  Check check{.name = name, .verdict = Verdict::kFail, .found = {}, .advice = {}};
  if (!facts.problem.empty()) {
    check.found = fmt::format("{}: {} ({})", facts.path, facts.problem, facts.me);
    check.advice = "give this user the right to enter the socket's folder";
    return check;
  }
  if (!facts.exists) {
    check.found = fmt::format("{} is not there", facts.path);
    check.advice =
        "start clusterkvd, or name its socket with --address; in a container, mount its folder";
    return check;
  }
  if (!facts.is_socket) {
    check.found = fmt::format("{} is no socket", facts.path);
    check.advice = "remove it, or choose another --listen";
    return check;
  }
  check.found = fmt::format("{}, {}:{} {:04o}", facts.path, facts.owner, facts.group, facts.mode);
  if (!facts.writable) {
    check.found += fmt::format("; not for {}", facts.me);
    check.advice = fmt::format(
        "put this user into group {} (usermod -aG {} NAME, then log in "
        "again), or runAsGroup in the pod",
        facts.group, facts.group);
  } else if ((facts.mode & 0002) != 0) {
    check.verdict = Verdict::kWarn;
    check.found += "; everyone may connect";
    check.advice = fmt::format("chmod 0660 {}", facts.path);
  } else {
    check.verdict = Verdict::kOk;
  }
  return check;
}

std::optional<Peer> ListenerOf(const std::string& path) {
  sockaddr_un address{};
  if (path.size() >= sizeof(address.sun_path)) return std::nullopt;
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), path.size());
  const gpu::UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid() ||
      connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return std::nullopt;
  }
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0 ||
      credentials.pid == 0) {
    return std::nullopt;
  }
  return Peer{.pid = credentials.pid, .uid = credentials.uid};
}

}  // namespace clusterkv::client::ctl
