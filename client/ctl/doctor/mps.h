// Does CUDA's Multi-Process Service run, and for whom?
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "client/ctl/doctor/check.h"
#include "client/ctl/doctor/machine.h"

namespace clusterkv::client::ctl {

struct MpsFacts {
  std::string pipe_directory = {};
  bool running = false;
  bool stale = false;                // its files are there, and no such process
  std::optional<uint32_t> uid = {};  // whose processes it serves; root's serves all
};

// `pipe_directory`: CUDA_MPS_PIPE_DIRECTORY, or empty for CUDA's own choice.
MpsFacts FindMps(const Machine& machine, const std::string& pipe_directory);

// `daemon_uid`: nullopt where no daemon was asked.
Check CheckMps(const MpsFacts& mps, bool has_gpu, std::optional<uint32_t> daemon_uid);

}  // namespace clusterkv::client::ctl
