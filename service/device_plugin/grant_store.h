// The grants on disk, so that they outlive the daemon: the kubelet does not allocate again for a
// pod that runs on, nor for a container that restarts.
//
//   DIRECTORY/lock                    held by the daemon
//   DIRECTORY/<grant>.json            the record: which devices. Outside of what the worker sees
//   DIRECTORY/<grant>/                mounted into the container; the sockets lie here
//
// A grant is there if its record is: it is written last (to a temporary name, synchronised,
// renamed) and removed first. A folder without a record is what a crash left, and goes at the next
// start; a record whose folder is gone gets it back. The folder itself stays the same for as long
// as the grant lives, since a container's mount follows the folder and not its name.
//
// DIRECTORY has mode 0700: who is not in a container can not reach the folders in it, which
// have 0755, so that any uid in a container can.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/unique_fd.h"
#include "service/grant_id.h"

namespace clusterkv::service {

struct GrantRecord {
  GrantId grant = kNoGrant;
  std::vector<std::string> devices;

  bool operator==(const GrantRecord&) const = default;
};

// Not thread-safe.
class GrantStore {
 public:
  // Makes the directory, and clears what is no grant.
  // Errors: FAILED_PRECONDITION (another daemon uses it), what errno says, naming the path.
  static absl::StatusOr<std::unique_ptr<GrantStore>> Open(const std::string& directory);

  // By id. A record that cannot be read is logged, and removed with its folder.
  // Errors: what errno says.
  absl::StatusOr<std::vector<GrantRecord>> Load();
  // Durable once it returns. Errors: what errno says, and nothing is left.
  absl::Status Add(const GrantRecord& record);
  // Gone for good once it returns; of one that is not there, nothing. Errors: what errno says.
  absl::Status Remove(GrantId grant);

  std::string folder(GrantId grant) const;

 private:
  GrantStore(std::string directory, gpu::UniqueFd lock, gpu::UniqueFd handle);

  std::string record_path(GrantId grant) const;
  absl::Status MakeFolder(GrantId grant) const;
  absl::Status RemoveDebris() const;
  absl::Status Synchronize() const;

  const std::string directory_;
  const gpu::UniqueFd lock_;    // flock
  const gpu::UniqueFd handle_;  // of the directory, to synchronise it
};

}  // namespace clusterkv::service
