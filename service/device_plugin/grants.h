// Grants: which container has which GiBs of the host pool. Keeps the three places together that
// know of one: the record on disk, the account in the core, and the sockets.
//
//   Allocate   revoke who had the devices ► record ► account ► sockets
//   revoke     account, and with it the sessions ► sockets ► record
//
// A crash in between leaves a record or none. With one the grant is there again at the next start;
// the kubelet, which had no answer, allocates anew, and that revokes it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/device_plugin/grant_sockets.h"
#include "service/device_plugin/grant_store.h"

namespace clusterkv::service {

class ServiceCore;

struct GrantsOptions {
  std::string directory;  // of the GrantStore
  uint32_t devices = 0;   // gib-0 to gib-(devices - 1)
  uint64_t device_bytes = 1ull << 30;
};

// What a container gets.
struct Grant {
  GrantId grant = kNoGrant;
  std::string folder;  // on the node
  uint64_t bytes = 0;
};

// Which of its free devices the kubelet would do best to take.
struct Preference {
  std::vector<std::string> available, must_include;
  size_t count = 0;
};

using DeviceIds = std::vector<std::string>;

// Not thread-safe. Its calls wait for the core and the disk.
class Grants {
 public:
  // Opens the grants of earlier daemons. One with devices that are no more (the pool has shrunk)
  // keeps what is left of them. The core must have been offered all devices.
  // Errors: those of GrantStore, the core and the sockets.
  static absl::StatusOr<std::unique_ptr<Grants>> Open(const GrantsOptions& options,
                                                      ServiceCore& core, GrantSockets& sockets);

  static std::string DeviceId(uint32_t device);
  DeviceIds devices() const;

  // A grant for each container, in order. Whoever had one of its devices is revoked: the kubelet
  // gives out a device again only when its container is gone, and tells no end otherwise.
  // Errors: INVALID_ARGUMENT (unknown device, one twice, none), and nothing changes; UNAVAILABLE
  // (draining), what errno says, and the containers have no grant.
  absl::StatusOr<std::vector<Grant>> Allocate(const std::vector<DeviceIds>& containers);

  // First those nobody was granted, then those of grants without a session: should the kubelet have
  // lost its records, workers that still run keep theirs. Fewer than asked for if there are not
  // enough.
  DeviceIds Prefer(const Preference& preference) const;

  size_t count() const { return grants_.size(); }

 private:
  Grants(const GrantsOptions& options, ServiceCore& core, GrantSockets& sockets,
         std::unique_ptr<GrantStore> store);

  absl::Status Check(const std::vector<DeviceIds>& containers) const;
  bool Known(const std::string& device) const;
  GrantId OwnerOf(const std::string& device) const;
  absl::Status OpenGrant(const GrantRecord& record);
  absl::Status Revoke(GrantId grant, const std::string& why);
  absl::StatusOr<Grant> Make(const DeviceIds& devices);
  uint64_t BytesOf(const DeviceIds& devices) const;

  const GrantsOptions options_;
  ServiceCore& core_;
  GrantSockets& sockets_;
  const std::unique_ptr<GrantStore> store_;
  std::map<GrantId, DeviceIds> grants_;
  std::unordered_map<std::string, GrantId> owners_;  // by device
  // The last that was revoked, by device: it may hold memory for a while.
  std::unordered_map<std::string, GrantId> former_;
};

}  // namespace clusterkv::service
