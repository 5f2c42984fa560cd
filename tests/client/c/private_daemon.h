// A clusterkvd for one test program: own directory, socket and host memory.
#pragma once

#include <sys/types.h>

struct private_daemon {
  pid_t pid;
  int ready_fd;  // stays open: a daemon without a reader would die of SIGPIPE
  char directory[64];
  char address[96];  // "unix:..."
};

// Waits until it serves; ends the test program if it does not. `daemon` lives as long as the
// program, whose exit stops what still runs. `backend`: "host" or "cuda".
void private_daemon_start(struct private_daemon* daemon, const char* program, const char* backend);
// Sends `signal`. Gives its exit code; 128 + the signal if it was killed by one.
int private_daemon_stop(struct private_daemon* daemon, int signal);
