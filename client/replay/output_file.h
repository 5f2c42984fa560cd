// A file to be written at the end of a long run: whether it can be is found out at the start.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/unique_fd.h"

namespace clusterkv::client::replay {

class OutputFile {
 public:
  // Makes PATH.part beside it. Errors: INVALID_ARGUMENT with the reason.
  static absl::StatusOr<std::unique_ptr<OutputFile>> Create(const std::string& path);
  // Without Commit nothing stays.
  ~OutputFile();

  // Writes it and puts it in place of what was there. Once. Errors: the system's.
  absl::Status Commit(const std::string& text);

 private:
  OutputFile(std::string path, gpu::UniqueFd fd);

  const std::string path_, part_;
  gpu::UniqueFd fd_;
};

}  // namespace clusterkv::client::replay
