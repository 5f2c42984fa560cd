#include "client/address.h"

#include <cstdlib>

namespace clusterkv::client {
namespace {

constexpr char kUnixPrefix[] = "unix:";

}  // namespace

std::string DefaultAddress() {
  const char* const given = std::getenv("CLUSTERKV_ADDRESS");
  return given != nullptr && *given != '\0' ? given : "unix:/run/clusterkv/clusterkvd.sock";
}

std::string ResolveAttachPath(const std::string& address, const std::string& attach_path) {
  if (attach_path.starts_with('/') || !address.starts_with(kUnixPrefix)) return attach_path;
  std::string socket = address.substr(sizeof(kUnixPrefix) - 1);
  if (socket.starts_with("//")) socket.erase(0, 2);  // unix:///PATH
  const size_t slash = socket.rfind('/');
  return slash == std::string::npos ? attach_path : socket.substr(0, slash + 1) + attach_path;
}

}  // namespace clusterkv::client
