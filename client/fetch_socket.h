// Served fetches over packets beside gRPC (proto/clusterkv/v1/fetch.proto): a connection of its own
// to the daemon's attach socket, one call at a time.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/deadline.h"
#include "clusterkv/v1/fetch.pb.h"
#include "gpu/unique_fd.h"

namespace clusterkv::client {

// Thread-compatible.
class FetchSocket {
 public:
  static constexpr size_t kMaxPacketBytes = 131072;

  // Errors: UNAVAILABLE, DEADLINE_EXCEEDED; PERMISSION_DENIED, RESOURCE_EXHAUSTED from the daemon.
  static absl::StatusOr<std::unique_ptr<FetchSocket>> Connect(const std::string& attach_path,
                                                              const Deadline& deadline);

  // The answer, whatever its code. With an error there is none, the daemon may yet make the step,
  // and the connection is over: UNAVAILABLE, DEADLINE_EXCEEDED, INTERNAL (not of the protocol).
  // REQUIRES: call.ByteSizeLong() <= kMaxPacketBytes, no call had an error.
  absl::StatusOr<v1::FetchAnswer> Call(const v1::FetchCall& call, const Deadline& deadline);

 private:
  explicit FetchSocket(gpu::UniqueFd fd) : fd_(std::move(fd)), buffer_(kMaxPacketBytes) {}
  absl::Status AwaitAnswer(const Deadline& deadline) const;

  const gpu::UniqueFd fd_;
  std::string request_;
  std::vector<char> buffer_;
};

}  // namespace clusterkv::client
