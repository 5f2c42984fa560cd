// Links the installed client and gets as far as one does without a daemon.
#include <cstdio>

#include "client/client.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: consumer ADDRESS, where no daemon is\n");
    return 2;
  }
  std::printf("clusterkv %s\n", CLUSTERKV_PACKAGE_VERSION);
  const auto client = clusterkv::client::Client::Connect(
      {.address = argv[1], .name = "consumer", .rpc_timeout = absl::Seconds(5)});
  if (client.ok() || client.status().code() != absl::StatusCode::kUnavailable) {
    std::printf("expected UNAVAILABLE, got %s\n", client.status().ToString().c_str());
    return 1;
  }
  std::printf("as expected: %s\n", client.status().ToString().c_str());
  return 0;
}
