#include "service/service_manager.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstddef>
#include <string_view>

#include "gpu/unique_fd.h"

namespace clusterkv::service {

absl::Status NotifyServiceManager(const char* socket, const std::string& state) {
  const std::string_view path = socket == nullptr ? "" : socket;
  if (path.empty()) return absl::OkStatus();
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if ((path.front() != '/' && path.front() != '@') || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(fmt::format("NOTIFY_SOCKET: '{}' is no socket's path", path));
  }
  path.copy(address.sun_path, path.size());
  if (path.front() == '@') address.sun_path[0] = '\0';  // the abstract namespace
  const gpu::UniqueFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
  if (!fd.valid() || sendto(fd.get(), state.data(), state.size(), MSG_NOSIGNAL,
                            reinterpret_cast<const sockaddr*>(&address), size) < 0) {
    const int error = errno;
    const std::string what = fmt::format("NOTIFY_SOCKET: {} to {}", state, path);
    return absl::ErrnoToStatus(error, what.c_str());
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::service
