#include "service/socket_lock.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

namespace clusterkv::service {

absl::StatusOr<gpu::UniqueFd> LockSocketPath(const std::string& key, const std::string& path) {
  std::error_code ignored;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), ignored);
  const std::string lock_path = path + ".lock";
  gpu::UniqueFd lock(open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0660));
  if (!lock.valid()) {
    return absl::UnavailableError(
        fmt::format("{}: cannot open {}: {}", key, lock_path, std::strerror(errno)));
  }
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(
        fmt::format("{}: another daemon serves {} (it holds {})", key, path, lock_path));
  }
  return lock;
}

}  // namespace clusterkv::service
