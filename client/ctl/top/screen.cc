#include "client/ctl/top/screen.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>

namespace clusterkv::client::ctl {
namespace {

constexpr char kEnter[] = "\x1b[?1049h\x1b[?25l";  // the other screen; no cursor
constexpr char kLeave[] = "\x1b[?25h\x1b[?1049l";
constexpr std::array<int, 5> kSignals = {SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGWINCH};

// Where the handler writes, and Wait reads. A handler can reach nothing but globals.
int g_signal_pipe[2] = {-1, -1};
std::array<struct sigaction, kSignals.size()> g_before;

void OnSignal(int number) {
  const int saved = errno;
  const auto byte = static_cast<char>(number);
  // If the pipe is full there is enough to read.
  if (write(g_signal_pipe[1], &byte, 1) != 1) errno = saved;
  errno = saved;
}

void WriteAll(const char* text, size_t bytes) {
  while (bytes > 0) {
    const ssize_t written = write(STDOUT_FILENO, text, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    text += written;
    bytes -= static_cast<size_t>(written);
  }
}

winsize Size() {
  winsize size{};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0 || size.ws_row == 0) {
    size.ws_col = 80;
    size.ws_row = 24;
  }
  return size;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Screen>> Screen::Create() {
  if (pipe2(g_signal_pipe, O_CLOEXEC | O_NONBLOCK) != 0) return absl::ErrnoToStatus(errno, "pipe");
  auto screen = std::unique_ptr<Screen>(new Screen);
  screen->has_keys_ = isatty(STDIN_FILENO) == 1 && tcgetattr(STDIN_FILENO, &screen->before_) == 0;
  screen->reads_keys_ = screen->has_keys_;
  struct sigaction action {};
  action.sa_handler = OnSignal;
  sigfillset(&action.sa_mask);
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &g_before[i]);
  screen->Enter();
  return screen;
}

Screen::~Screen() {
  Leave();
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &g_before[i], nullptr);
  for (int& end : g_signal_pipe) {
    close(end);
    end = -1;
  }
}

void Screen::Enter() {
  if (has_keys_) {
    termios keys = before_;
    keys.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);  // each key at once; signals stay
    tcsetattr(STDIN_FILENO, TCSANOW, &keys);
  }
  WriteAll(kEnter, sizeof(kEnter) - 1);
}

void Screen::Leave() {
  WriteAll(kLeave, sizeof(kLeave) - 1);
  if (has_keys_) tcsetattr(STDIN_FILENO, TCSANOW, &before_);
}

void Screen::Draw(const std::vector<StyledLine>& lines, bool colour) {
  const winsize size = Size();
  std::string frame = "\x1b[H";
  for (size_t i = 0; i < lines.size() && i < size.ws_row; ++i) {
    if (i > 0) frame += "\r\n";
    frame += lines[i].Render(size.ws_col, colour) + "\x1b[K";
  }
  frame += "\x1b[J";
  WriteAll(frame.data(), frame.size());
}

Screen::Event Screen::Take(int signal_number) {
  if (signal_number == SIGWINCH) return Event::kResized;
  if (signal_number != SIGTSTP) return Event::kQuit;
  Leave();
  raise(SIGSTOP);  // goes on here once the shell says so
  Enter();
  return Event::kResized;
}

Screen::Event Screen::Wait(absl::Duration timeout) {
  const absl::Time end = absl::Now() + timeout;
  while (true) {
    std::array<pollfd, 2> ready = {{{.fd = g_signal_pipe[0], .events = POLLIN, .revents = 0},
                                    {.fd = STDIN_FILENO, .events = POLLIN, .revents = 0}}};
    const absl::Duration left = end - absl::Now();
    if (left <= absl::ZeroDuration()) return Event::kTimeout;
    const auto milliseconds = static_cast<int>(absl::ToInt64Milliseconds(left) + 1);
    if (poll(ready.data(), reads_keys_ ? 2 : 1, milliseconds) < 0 && errno != EINTR)
      return Event::kQuit;
    char byte = 0;
    if (read(g_signal_pipe[0], &byte, 1) == 1) return Take(byte);
    if (reads_keys_ && ready[1].revents != 0) {
      if (read(STDIN_FILENO, &byte, 1) != 1) reads_keys_ = false;  // the terminal has gone
      if (byte == 'q' || byte == 'Q') return Event::kQuit;
    }
  }
}

}  // namespace clusterkv::client::ctl
