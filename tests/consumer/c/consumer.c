// Links the installed C library and gets as far as one does without a daemon.
#include <clusterkv/clusterkv.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: c_consumer ADDRESS, where no daemon is\n");
    return 2;
  }
  printf("clusterkv %s, C\n", clusterkv_version());
  clusterkv_client_options options = CLUSTERKV_CLIENT_OPTIONS_INIT;
  options.address = argv[1];
  options.name = "c_consumer";
  options.rpc_timeout_seconds = 5;
  clusterkv_client* client;
  const clusterkv_status status = clusterkv_client_connect(&options, &client);
  if (status != CLUSTERKV_UNAVAILABLE || strcmp(clusterkv_version(), CLUSTERKV_VERSION) != 0) {
    printf("expected UNAVAILABLE, got %s: %s\n", clusterkv_status_name(status),
           clusterkv_last_error());
    return 1;
  }
  printf("as expected: %s: %s\n", clusterkv_status_name(status), clusterkv_last_error());
  return 0;
}
