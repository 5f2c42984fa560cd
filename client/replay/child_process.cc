#include "client/replay/child_process.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace clusterkv::client::replay {
namespace {

constexpr int kCannotExecute = 127;  // as shells say it
constexpr absl::Duration kPollInterval = absl::Milliseconds(5);

// Between fork and exec: only what is safe after fork in a process with threads.
[[noreturn]] void Execute(const ChildOptions& options, char* const* arguments, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(kCannotExecute);  // died before prctl
  if (options.group == ChildOptions::Group::kOwn) setpgid(0, 0);
  if (options.stdout_fd >= 0) dup2(options.stdout_fd, STDOUT_FILENO);
  if (options.stderr_fd >= 0) dup2(options.stderr_fd, STDERR_FILENO);
  if (options.kept_fd >= 0) fcntl(options.kept_fd, F_SETFD, 0);
  execvp(arguments[0], arguments);
  _exit(kCannotExecute);
}

}  // namespace

std::string ChildEnd::Describe() const {
  if (signal != 0) {
    return absl::StrCat("was killed by signal ", signal, " (", strsignal(signal), ")");
  }
  return absl::StrCat("exited with code ", exit_code);
}

absl::StatusOr<ChildProcess> ChildProcess::Start(const ChildOptions& options) {
  std::vector<std::string> arguments = options.arguments;
  std::vector<char*> pointers;
  pointers.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return absl::ErrnoToStatus(errno, absl::StrCat("fork for ", arguments[0]));
  if (pid == 0) Execute(options, pointers.data(), parent);
  return ChildProcess(pid);
}

ChildProcess::ChildProcess(ChildProcess&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}

ChildProcess& ChildProcess::operator=(ChildProcess&& other) noexcept {
  if (this != &other) {
    KillAndReap();
    pid_ = std::exchange(other.pid_, -1);
  }
  return *this;
}

ChildProcess::~ChildProcess() { KillAndReap(); }

void ChildProcess::KillAndReap() {
  if (pid_ < 0) return;
  kill(pid_, SIGKILL);
  while (waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
}

void ChildProcess::Signal(int signal) const {
  if (pid_ >= 0) kill(pid_, signal);
}

absl::StatusOr<ChildEnd> ChildProcess::Wait(absl::Duration timeout) {
  if (pid_ < 0) return absl::FailedPreconditionError("the process has been waited for");
  const absl::Time deadline = absl::Now() + timeout;
  while (true) {
    int state = 0;
    const pid_t ended = waitpid(pid_, &state, WNOHANG);
    if (ended == pid_) {
      pid_ = -1;
      if (WIFSIGNALED(state)) return ChildEnd{.signal = WTERMSIG(state)};
      return ChildEnd{.exit_code = WEXITSTATUS(state)};
    }
    if (ended < 0 && errno != EINTR) return absl::ErrnoToStatus(errno, "waitpid");
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("process ", pid_, " still runs after ", absl::FormatDuration(timeout)));
    }
    absl::SleepFor(kPollInterval);
  }
}

std::string ProgramPath() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).string();
}

std::string ProgramDirectory() {
  return std::filesystem::path(ProgramPath()).parent_path().string();
}

}  // namespace clusterkv::client::replay
