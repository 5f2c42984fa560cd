#include "client/ctl/doctor/machine.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "gpu/unique_fd.h"

namespace clusterkv::client::ctl {
namespace {

constexpr size_t kMaxVersionBytes = 4096;
constexpr int kVersionMilliseconds = 3000;

std::string Trimmed(std::string text) {
  text.erase(text.find_last_not_of(" \t\r\n") + 1);
  return text;
}

// Up to the end, the bound, or the time between two pieces.
std::string ReadPipe(int fd) {
  std::string text(kMaxVersionBytes, '\0');
  size_t size = 0;
  pollfd ready{.fd = fd, .events = POLLIN, .revents = 0};
  while (size < text.size() && poll(&ready, 1, kVersionMilliseconds) > 0) {
    const ssize_t bytes = read(fd, text.data() + size, text.size() - size);
    if (bytes <= 0) break;
    size += static_cast<size_t>(bytes);
  }
  text.resize(size);
  return text;
}

}  // namespace

bool Machine::Exists(const std::string& path) const {
  std::error_code error;
  return std::filesystem::exists(Path(path), error);
}

std::optional<std::string> Machine::Read(const std::string& path) const {
  std::error_code error;
  if (std::filesystem::is_directory(Path(path), error)) return std::nullopt;
  std::ifstream file(Path(path), std::ios::binary);
  if (!file) return std::nullopt;
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (file.bad()) return std::nullopt;
  return Trimmed(std::move(text));
}

std::vector<std::string> Machine::List(const std::string& path) const {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(Path(path), error), end; !error && entry != end;
       entry.increment(error)) {
    names.push_back(entry->path().filename().string());
  }
  std::ranges::sort(names);
  return names;
}

std::optional<std::string> Machine::VersionOf(const std::string& path) const {
  const std::string program = Path(path);
  int ends[2];
  if (access(program.c_str(), X_OK) != 0 || pipe2(ends, O_CLOEXEC) != 0) return std::nullopt;
  const gpu::UniqueFd output(ends[0]);
  gpu::UniqueFd input(ends[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, input.get(), STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  std::string version = "--version";
  std::string name = program;
  char* const arguments[] = {name.data(), version.data(), nullptr};
  char* const environment[] = {nullptr};
  pid_t pid = 0;
  const int failed = posix_spawn(&pid, program.c_str(), &actions, nullptr, arguments, environment);
  posix_spawn_file_actions_destroy(&actions);
  input.Reset();
  if (failed != 0) return std::nullopt;
  std::string text = ReadPipe(output.get());
  kill(pid, SIGKILL);  // of one that has ended nothing is left to end
  int status = 0;
  waitpid(pid, &status, 0);
  if (text.empty()) return std::nullopt;
  return Trimmed(std::move(text));
}

}  // namespace clusterkv::client::ctl
