#include "client/replay/private_daemon.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/replay/interrupt.h"
#include "gpu/status_macros.h"
#include "gpu/unique_fd.h"

namespace clusterkv::client::replay {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMegabyte = 1ull << 20;  // as clusterkvd reads "mb"
constexpr uint64_t kLargestChunkBytes = 1ull << 30;
// The daemon packs segments of one KV head into chunks: eight to a chunk waste an eighth at most.
constexpr uint64_t kSegmentsPerChunk = 8;
// Beside the rows of a segment of one KV head: a 4-byte position for each, and alignment.
constexpr uint64_t kPositionBytes = 4;
constexpr uint64_t kSegmentBytes = 512;
constexpr absl::Duration kStopTimeout = absl::Seconds(60);
constexpr size_t kTailBytes = 2000;

// Memory if it has the room (and the backend needs it), else the usual place.
std::string TemporaryBase(uint64_t bytes) {
  std::string memory = "/dev/shm";
  struct statvfs room = {};
  if (access(memory.c_str(), W_OK) == 0 && statvfs(memory.c_str(), &room) == 0 &&
      room.f_bavail * room.f_frsize > bytes + bytes / 8) {
    return memory;
  }
  std::error_code error;
  const fs::path base = fs::temp_directory_path(error);
  return error ? "/tmp" : fs::absolute(base).string();
}

std::string DaemonProgram(const std::string& wanted) {
  if (!wanted.empty()) return wanted;
  const std::string beside = ProgramDirectory() + "/clusterkvd";
  return access(beside.c_str(), X_OK) == 0 ? beside : "clusterkvd";
}

}  // namespace

HostMemory HostMemoryFor(const Trace& trace, const gpu::MethodOptions& method, uint32_t workers,
                         uint32_t sequences) {
  const uint64_t tokens = trace.tokens();
  const auto segment_bytes = [&](uint64_t length) {
    return length * (trace.shape().row_bytes() + kPositionBytes) + kSegmentBytes;
  };
  // Of all (layer, KV head) pairs; segments take their full length however few tokens come.
  const auto bytes = [&](uint64_t count, uint64_t longest) {
    const uint64_t length = std::min(longest, tokens);
    return (count + length - 1) / length * segment_bytes(length) * trace.shape().problems();
  };
  const uint64_t window = uint64_t{method.min_window_tokens} + method.decode_segment_tokens;
  // Prompt or decode segments may fill the sequence; what leaves the window lies twice for a time.
  const uint64_t sequence_bytes = std::max(bytes(tokens, method.prompt_segment_tokens),
                                           bytes(tokens, method.decode_segment_tokens)) +
                                  bytes(std::min(tokens, window), method.decode_segment_tokens);
  const uint64_t longest = std::min<uint64_t>(
      tokens, std::max(method.prompt_segment_tokens, method.decode_segment_tokens));
  HostMemory memory;
  while (memory.chunk_bytes < kSegmentsPerChunk * segment_bytes(longest) &&
         memory.chunk_bytes < kLargestChunkBytes) {
    memory.chunk_bytes *= 2;
  }
  const uint64_t wanted = workers * (sequences * sequence_bytes / 4 * 5 + 2 * memory.chunk_bytes);
  const uint64_t chunks = (wanted + memory.chunk_bytes - 1) / memory.chunk_bytes;
  memory.total_bytes = std::max(memory.total_bytes, chunks * memory.chunk_bytes);
  return memory;
}

absl::StatusOr<std::unique_ptr<PrivateDaemon>> PrivateDaemon::Start(
    const PrivateDaemonOptions& options) {
  std::unique_ptr<PrivateDaemon> daemon(new PrivateDaemon());
  CKV_RETURN_IF_ERROR(daemon->Launch(options));
  return daemon;
}

PrivateDaemon::~PrivateDaemon() {
  Stop().IgnoreError();
  if (stdout_fd_ >= 0) close(stdout_fd_);
}

absl::Status PrivateDaemon::Launch(const PrivateDaemonOptions& options) {
  CKV_ASSIGN_OR_RETURN(directory_,
                       ScratchDirectory::Create(TemporaryBase(options.memory.total_bytes)));
  const std::string& directory = directory_->path();
  address_ = absl::StrCat("unix:", directory, "/clusterkvd.sock");
  log_path_ = directory + "/clusterkvd.log";
  gpu::UniqueFd log(open(log_path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  int ends[2];
  if (!log.valid() || pipe2(ends, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, directory);
  stdout_fd_ = ends[0];
  gpu::UniqueFd write_end(ends[1]);
  const auto megabytes = [](uint64_t bytes) { return absl::StrCat(bytes / kMegabyte, "mb"); };
  ChildOptions child;
  child.arguments = {DaemonProgram(options.program),
                     "--listen",
                     address_,
                     "--admin-listen",
                     "127.0.0.1:0",
                     "--host-memory",
                     megabytes(options.memory.total_bytes),
                     "--host-chunk",
                     megabytes(options.memory.chunk_bytes),
                     "--host-memory-dir",
                     directory + "/host",
                     "--backend",
                     options.backend};
  child.stdout_fd = write_end.get();
  child.stderr_fd = log.get();
  child.group = ChildOptions::Group::kOwn;
  CKV_ASSIGN_OR_RETURN(process_, ChildProcess::Start(child));
  write_end.Reset();  // so that its death ends the pipe
  return WaitUntilReady(stdout_fd_, options.start_timeout);
}

absl::Status PrivateDaemon::WaitUntilReady(int stdout_fd, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  std::string line;
  while (line.find('\n') == std::string::npos) {
    CKV_RETURN_IF_ERROR(CheckInterrupt());
    if (absl::Now() >= deadline) {
      return absl::UnavailableError(absl::StrCat("the private clusterkvd is not ready after ",
                                                 absl::FormatDuration(timeout), LogTail()));
    }
    pollfd readable = {.fd = stdout_fd, .events = POLLIN, .revents = 0};
    if (poll(&readable, 1, /*timeout=*/100) <= 0) continue;
    char buffer[512];
    const ssize_t bytes = read(stdout_fd, buffer, sizeof(buffer));
    if (bytes == 0) return DiedBeforeReady();
    if (bytes > 0) line.append(buffer, static_cast<size_t>(bytes));
  }
  if (absl::StartsWith(line, "READY ")) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("the private clusterkvd said \"",
                                             line.substr(0, line.find('\n')), "\" instead of READY",
                                             LogTail()));
}

absl::Status PrivateDaemon::DiedBeforeReady() {
  const absl::StatusOr<ChildEnd> end = process_->Wait(kStopTimeout);
  if (!end.ok()) return end.status();
  const std::string message = absl::StrCat(
      "the private clusterkvd ", end->Describe(), " before it was ready",
      end->exit_code == 127 ? " (no such program beside this one or on PATH)" : "", LogTail());
  // Its codes are ours: 2 configuration, 3 unavailable, 4 resource exhausted.
  if (end->signal == 0 && end->exit_code == 2) return absl::InvalidArgumentError(message);
  if (end->signal == 0 && end->exit_code == 4) return absl::ResourceExhaustedError(message);
  return absl::UnavailableError(message);
}

absl::Status PrivateDaemon::Stop() {
  if (!process_.has_value()) return absl::OkStatus();
  process_->Signal(SIGTERM);
  absl::StatusOr<ChildEnd> end = process_->Wait(kStopTimeout);
  absl::Status status = absl::OkStatus();
  if (!end.ok()) {
    status = absl::InternalError(
        absl::StrCat("the private clusterkvd did not drain: ", end.status().message(), LogTail()));
  } else if (end->signal != 0 || end->exit_code != 0) {
    status =
        absl::InternalError(absl::StrCat("the private clusterkvd ", end->Describe(), LogTail()));
  }
  process_.reset();
  return status;
}

std::string PrivateDaemon::LogTail() const {
  std::ifstream log(log_path_, std::ios::binary | std::ios::ate);
  if (!log) return "";
  const auto size = static_cast<size_t>(std::max<std::streamoff>(0, log.tellg()));
  const size_t begin = size > kTailBytes ? size - kTailBytes : 0;
  std::string tail(size - begin, '\0');
  log.seekg(static_cast<std::streamoff>(begin));
  log.read(tail.data(), static_cast<std::streamsize>(tail.size()));
  return tail.empty() ? "" : absl::StrCat("; its log ends:\n", tail);
}

}  // namespace clusterkv::client::replay
