#include "client/replay/scratch_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/time/clock.h"

namespace clusterkv::client::replay {
namespace {

namespace fs = std::filesystem;

constexpr char kPrefix[] = "clusterkv-replay-";

// A valid descriptor that holds the lock, unless somebody else does.
gpu::UniqueFd Lock(const std::string& path) {
  gpu::UniqueFd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (fd.valid() && flock(fd.get(), LOCK_EX | LOCK_NB) != 0) fd.Reset();
  return fd;
}

void RemoveAbandoned(const std::string& base, absl::Duration abandoned_after) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(base, error)) {
    if (!absl::StartsWith(entry.path().filename().string(), kPrefix)) continue;
    const gpu::UniqueFd lock = Lock(entry.path().string());
    struct stat state = {};
    if (!lock.valid() || fstat(lock.get(), &state) != 0 || state.st_uid != geteuid()) continue;
    const absl::Duration age = absl::Now() - absl::TimeFromTimespec(state.st_mtim);
    if (age >= abandoned_after) fs::remove_all(entry.path(), error);
  }
}

}  // namespace

ScratchDirectory::ScratchDirectory(std::string path, gpu::UniqueFd lock)
    : path_(std::move(path)), lock_(std::move(lock)) {}

ScratchDirectory::~ScratchDirectory() {
  std::error_code error;
  fs::remove_all(path_, error);
}

absl::StatusOr<std::unique_ptr<ScratchDirectory>> ScratchDirectory::Create(
    const std::string& base, absl::Duration abandoned_after) {
  RemoveAbandoned(base, abandoned_after);
  std::string path = base + "/" + kPrefix + "XXXXXX";
  if (mkdtemp(path.data()) == nullptr) return absl::ErrnoToStatus(errno, path);
  gpu::UniqueFd lock = Lock(path);
  // Made before the check, so that the directory goes with it.
  std::unique_ptr<ScratchDirectory> directory(new ScratchDirectory(path, std::move(lock)));
  if (!directory->lock_.valid()) return absl::ErrnoToStatus(errno, "locking " + path);
  return directory;
}

}  // namespace clusterkv::client::replay
