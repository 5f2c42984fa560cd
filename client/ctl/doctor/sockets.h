// May this user reach the daemon's sockets?
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>

#include "client/ctl/doctor/check.h"

namespace clusterkv::client::ctl {

struct SocketFacts {
  std::string path;
  bool exists = false;
  bool is_socket = false;
  mode_t mode = 0;
  std::string owner, group;  // names, or numbers where they have none
  bool writable = false;     // by whoever asks: connecting needs it
  std::string problem;       // why it cannot be seen, if it is not just missing
  std::string me;            // "uid 1000, groups 1000 27"
};

SocketFacts ReadSocket(const std::string& path);
// `name`: "gRPC socket", "attach socket".
Check CheckSocket(const std::string& name, const SocketFacts& facts);

struct Peer {
  pid_t pid = 0;
  uid_t uid = 0;
};
// The process that listens on a UNIX stream socket, as the kernel knows it; nullopt if none does or
// it is in another pid namespace.
std::optional<Peer> ListenerOf(const std::string& path);

}  // namespace clusterkv::client::ctl
