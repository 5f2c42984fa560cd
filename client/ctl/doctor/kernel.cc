#include "client/ctl/doctor/kernel.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "gpu/unique_fd.h"

namespace clusterkv::client::ctl {
namespace {

constexpr int kPeerPidfd = 77;  // SO_PEERPIDFD, younger than some system headers

}  // namespace

KernelFacts ProbeKernel() {
  KernelFacts facts;
  utsname name{};
  if (uname(&name) == 0) facts.release = name.release;
  const gpu::UniqueFd own(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  facts.pidfd = own.valid();
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return facts;
  const gpu::UniqueFd one(ends[0]), other(ends[1]);
  int peer = -1;
  socklen_t size = sizeof(peer);
  if (getsockopt(one.get(), SOL_SOCKET, kPeerPidfd, &peer, &size) == 0) {
    facts.peer_pidfd = true;
    close(peer);
  }
  return facts;
}

Check CheckKernel(const KernelFacts& facts) {
  Check check{.name = "kernel", .verdict = Verdict::kOk, .found = {}, .advice = {}};
  if (facts.peer_pidfd) {
    check.found =
        fmt::format("Linux {} with SO_PEERPIDFD: a worker's death is seen at once", facts.release);
    return check;
  }
  check.verdict = Verdict::kWarn;
  check.found = fmt::format(
      "Linux {} has no SO_PEERPIDFD{}: a record lock on a lifeline file tells a worker's death",
      facts.release, facts.pidfd ? "" : " and no pidfd_open");
  check.advice = "works as it is; Linux 6.5 or later sees death across pid namespaces too";
  return check;
}

}  // namespace clusterkv::client::ctl
