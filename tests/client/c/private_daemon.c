#define _GNU_SOURCE  // nftw

#include "tests/client/c/private_daemon.h"

#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { kStartMilliseconds = 120000 };

static struct private_daemon* running;

static void fail(const char* what) {
  perror(what);
  exit(1);
}

static int remove_entry(const char* path, const struct stat* status, int type, struct FTW* ftw) {
  (void)status, (void)type, (void)ftw;
  return remove(path);
}

// Does not return.
static void run(const struct private_daemon* daemon, const char* program, const char* backend,
                int stdout_fd) {
  char log[96], memory[96];
  snprintf(log, sizeof(log), "%s/log", daemon->directory);
  snprintf(memory, sizeof(memory), "%s/memory", daemon->directory);
  const int log_fd = open(log, O_CREAT | O_WRONLY, 0600);
  if (log_fd < 0 || dup2(log_fd, STDERR_FILENO) < 0 || dup2(stdout_fd, STDOUT_FILENO) < 0 ||
      prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) {
    _exit(126);
  }
  execl(program, program, "--listen", daemon->address, "--admin-listen", "127.0.0.1:0",
        "--host-memory", "64mb", "--host-chunk", "4mb", "--host-memory-dir", memory, "--backend",
        backend, (char*)NULL);
  _exit(127);
}

static void stop_running(void) {
  if (running != NULL) private_daemon_stop(running, SIGKILL);
}

void private_daemon_start(struct private_daemon* daemon, const char* program, const char* backend) {
  const char* const base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  snprintf(daemon->directory, sizeof(daemon->directory), "%s/ckv-c-XXXXXX", base);
  if (mkdtemp(daemon->directory) == NULL) fail("mkdtemp");
  snprintf(daemon->address, sizeof(daemon->address), "unix:%s/d.sock", daemon->directory);
  int ends[2];
  if (pipe(ends) != 0) fail("pipe");
  daemon->ready_fd = ends[0];
  daemon->pid = fork();
  if (daemon->pid < 0) fail("fork");
  if (daemon->pid == 0) run(daemon, program, backend, ends[1]);
  close(ends[1]);
  running = daemon;
  atexit(stop_running);
  char line[256] = "";
  size_t length = 0;
  while (length + 1 < sizeof(line) && strchr(line, '\n') == NULL) {
    struct pollfd readable = {.fd = daemon->ready_fd, .events = POLLIN};
    if (poll(&readable, 1, kStartMilliseconds) != 1) break;
    const ssize_t bytes = read(daemon->ready_fd, line + length, sizeof(line) - 1 - length);
    if (bytes <= 0) break;
    length += (size_t)bytes;
    line[length] = '\0';
  }
  if (strncmp(line, "READY ", 6) == 0) return;
  fprintf(stderr, "the daemon is not ready: \"%s\"\n", line);
  exit(1);
}

int private_daemon_stop(struct private_daemon* daemon, int signal) {
  int end = 0;
  kill(daemon->pid, signal);
  const pid_t reaped = waitpid(daemon->pid, &end, 0);
  close(daemon->ready_fd);
  nftw(daemon->directory, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
  running = NULL;
  if (reaped != daemon->pid) return -1;
  return WIFEXITED(end) ? WEXITSTATUS(end) : 128 + WTERMSIG(end);
}
