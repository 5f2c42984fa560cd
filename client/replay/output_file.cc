#include "client/replay/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace clusterkv::client::replay {
namespace {

std::string PartOf(const std::string& path) { return path + ".part"; }

}  // namespace

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Create(const std::string& path) {
  struct stat info {};
  const bool folder = stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
  if (folder) errno = EISDIR;
  gpu::UniqueFd fd(
      folder ? -1 : open(PartOf(path).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!fd.valid()) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot write \"", path, "\": ", std::strerror(errno)));
  }
  return std::unique_ptr<OutputFile>(new OutputFile(path, std::move(fd)));
}

OutputFile::OutputFile(std::string path, gpu::UniqueFd fd)
    : path_(std::move(path)), part_(PartOf(path_)), fd_(std::move(fd)) {}

OutputFile::~OutputFile() {
  if (fd_.valid()) unlink(part_.c_str());
}

absl::Status OutputFile::Commit(const std::string& text) {
  for (size_t written = 0; written < text.size();) {
    const ssize_t bytes = write(fd_.get(), text.data() + written, text.size() - written);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes < 0) return absl::ErrnoToStatus(errno, absl::StrCat("writing ", path_));
    written += static_cast<size_t>(bytes);
  }
  if (std::rename(part_.c_str(), path_.c_str()) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("writing ", path_));
  }
  fd_.Reset();
  return absl::OkStatus();
}

}  // namespace clusterkv::client::replay
