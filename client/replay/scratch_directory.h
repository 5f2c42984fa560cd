// A directory of our own for the time that this process lives.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gpu/unique_fd.h"

namespace clusterkv::client::replay {

// Move-only. Destruction removes the directory with all that is in it. It is locked while its owner
// lives, so that what a killed owner left (host memory, perhaps gigabytes) can be told and removed.
class ScratchDirectory {
 public:
  // Makes `base`/clusterkv-replay-XXXXXX, mode 0700. First removes directories of that name there
  // that are ours, unlocked, and untouched for `abandoned_after`: a new one is not locked at once.
  static absl::StatusOr<std::unique_ptr<ScratchDirectory>> Create(
      const std::string& base, absl::Duration abandoned_after = absl::Minutes(1));
  ~ScratchDirectory();

  const std::string& path() const { return path_; }

 private:
  ScratchDirectory(std::string path, gpu::UniqueFd lock);

  const std::string path_;
  const gpu::UniqueFd lock_;
};

}  // namespace clusterkv::client::replay
