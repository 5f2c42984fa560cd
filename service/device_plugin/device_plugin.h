// Offers the host pool to the kubelet as `clusterkv.io/host-gib`, a device for each GiB.
//
// A pod asks for GiBs as it asks for CPU. What it is allocated is a grant: a folder with sockets of
// its own, mounted into the container, whose sessions are together held to those GiBs. The rest of
// the pool is the commons, of workers at the daemon's own socket; it never takes what is offered.
//
// The kubelet makes its directory anew when it starts, and our socket goes with it. So once a
// second both sockets are looked at: ours is made again if it is gone, and we register again if it
// was, if the kubelet's is another one, or if the kubelet does not watch us although we have
// registered.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/device_plugin/grants.h"

namespace clusterkv::service {

class ServiceCore;

struct DevicePluginOptions {
  std::string directory;  // of the kubelet: its socket lies there, and ours will
  GrantsOptions grants;
};

// Thread-safe.
class DevicePlugin {
 public:
  // Opens the grants of earlier daemons; the kubelet hears of us with the first Tick. The core and
  // the sockets must outlive it.
  // Errors: FAILED_PRECONDITION (no such directory, another plugin or daemon is there), those of
  // Grants, UNAVAILABLE (cannot bind).
  static absl::StatusOr<std::unique_ptr<DevicePlugin>> Create(
      const DevicePluginOptions& options, ServiceCore& core, std::unique_ptr<GrantSockets> sockets);
  virtual ~DevicePlugin() = default;

  // Housekeeping, once a second: health, sockets, registration. Does not block.
  virtual void Tick() = 0;
  // The kubelet has taken our registration, and watches.
  virtual bool registered() const = 0;
  // The kubelet's calls, then the grants' sockets; the grants themselves stay for the next daemon.
  // Calls that run have the timeout to come to their end. Idempotent.
  virtual void Shutdown(absl::Duration timeout) = 0;
};

}  // namespace clusterkv::service
