// Owns one child process; it does not outlive us.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace clusterkv::client::replay {

struct ChildOptions {
  std::vector<std::string> arguments;                     // the first is the program's path
  int stdout_fd = -1;                                     // -1: ours
  int stderr_fd = -1;                                     // -1: ours
  int kept_fd = -1;                                       // stays open under its number; -1: none
  enum class Group { kOurs, kOwn } group = Group::kOurs;  // own: a terminal's Ctrl-C passes it by
};

// How a process ended.
struct ChildEnd {
  int exit_code = 0;  // if signal is 0
  int signal = 0;
  std::string Describe() const;  // "exited with code 3", "was killed by signal 9 (Killed)"
};

// Move-only. Destruction kills and reaps what still runs.
class ChildProcess {
 public:
  // Starts from the main thread: the kernel kills the child when the thread that started it ends.
  // Errors: what errno says of fork; a program that cannot be executed ends with code 127.
  static absl::StatusOr<ChildProcess> Start(const ChildOptions& options);
  ChildProcess(ChildProcess&& other) noexcept;
  ChildProcess& operator=(ChildProcess&& other) noexcept;
  ~ChildProcess();

  pid_t pid() const { return pid_; }
  void Signal(int signal) const;
  // Errors: DEADLINE_EXCEEDED.
  absl::StatusOr<ChildEnd> Wait(absl::Duration timeout);

 private:
  explicit ChildProcess(pid_t pid) : pid_(pid) {}
  void KillAndReap();

  pid_t pid_ = -1;  // -1 once reaped
};

// The directory of the program that runs.
std::string ProgramDirectory();
std::string ProgramPath();

}  // namespace clusterkv::client::replay
