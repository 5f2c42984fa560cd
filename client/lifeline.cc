#include "client/lifeline.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>

#include "absl/status/status.h"

namespace clusterkv::client {

absl::StatusOr<gpu::UniqueFd> CreateLifeline() {
  gpu::UniqueFd fd(memfd_create("clusterkv-lifeline", MFD_CLOEXEC));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, "memfd_create of the lifeline");
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;  // from 0, length 0: the whole file
  if (fcntl(fd.get(), F_SETLK, &lock) != 0) {
    return absl::ErrnoToStatus(errno, "record lock of the lifeline");
  }
  return fd;
}

}  // namespace clusterkv::client
