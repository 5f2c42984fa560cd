// FetchClusters calls of one user: over a connection of their own while there is one and they fit
// its packets, by gRPC otherwise.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "client/connection.h"
#include "client/deadline.h"
#include "client/fetch_socket.h"
#include "clusterkv/v1/sequence.pb.h"

namespace clusterkv::client {

// Thread-compatible.
class FetchCalls {
 public:
  // The connection must outlive it. `socket` may be null.
  FetchCalls(Connection& connection, std::unique_ptr<FetchSocket> socket)
      : connection_(connection), socket_(std::move(socket)) {}

  // answer_bytes: at most so many in the reply's tensors, over all items. Errors: the daemon's;
  // UNAVAILABLE and DEADLINE_EXCEEDED leave open whether the step was made.
  absl::StatusOr<v1::FetchClustersReply> Call(v1::FetchClustersRequest request,
                                              uint64_t answer_bytes, const Deadline& deadline);

 private:
  Connection& connection_;
  std::unique_ptr<FetchSocket> socket_;  // null: none, or it is over
};

}  // namespace clusterkv::client
