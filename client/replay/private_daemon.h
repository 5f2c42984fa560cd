// A clusterkvd for one replay: its own directory, socket and host memory, gone at the end.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/replay/child_process.h"
#include "client/replay/scratch_directory.h"
#include "client/replay/trace.h"
#include "gpu/method_options.h"

namespace clusterkv::client::replay {

// Both multiples of a MiB.
struct HostMemory {
  uint64_t total_bytes = 256ull << 20;
  uint64_t chunk_bytes = 16ull << 20;
};

// For so many sequences of a trace at once, each worker a session that is lent whole chunks.
HostMemory HostMemoryFor(const Trace& trace, const gpu::MethodOptions& method, uint32_t workers,
                         uint32_t sequences);

struct PrivateDaemonOptions {
  std::string program;  // empty: clusterkvd beside this program, else from PATH
  std::string backend = "auto";
  HostMemory memory;
  absl::Duration start_timeout = absl::Minutes(5);  // host memory is pinned first
};

class PrivateDaemon {
 public:
  // Waits until it serves. Errors: what its exit code stands for (INVALID_ARGUMENT,
  // RESOURCE_EXHAUSTED, else UNAVAILABLE), with the end of what it wrote on stderr; CANCELLED.
  static absl::StatusOr<std::unique_ptr<PrivateDaemon>> Start(const PrivateDaemonOptions& options);
  ~PrivateDaemon();

  const std::string& address() const { return address_; }
  // SIGTERM, then waits for the drain. Errors: INTERNAL unless it exits with 0 in time. Idempotent.
  absl::Status Stop();

 private:
  PrivateDaemon() = default;
  absl::Status Launch(const PrivateDaemonOptions& options);
  absl::Status WaitUntilReady(int stdout_fd, absl::Duration timeout);
  absl::Status DiedBeforeReady();
  std::string LogTail() const;

  std::unique_ptr<ScratchDirectory> directory_;
  std::string address_;
  std::string log_path_;
  int stdout_fd_ = -1;  // stays open: a daemon without a reader would die of SIGPIPE
  std::optional<ChildProcess> process_;
};

}  // namespace clusterkv::client::replay
