// The gRPC channel to one daemon: the only file of the client that knows gRPC is its .cc.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/deadline.h"
#include "clusterkv/v1/sequence.pb.h"
#include "clusterkv/v1/session.pb.h"
#include "clusterkv/v1/status.pb.h"

namespace clusterkv::client {

// The Session stream as its reader sees it. One reader, one writer; Cancel from any thread.
class SessionCall {
 public:
  virtual ~SessionCall() = default;
  virtual bool Write(const v1::SessionRequest& request) = 0;
  // Waits for the next event; false: the stream is over, Finish tells why.
  virtual bool Read(v1::SessionEvent* event) = 0;
  virtual void WritesDone() = 0;
  // After Read was false; once.
  virtual absl::Status Finish() = 0;
  // Ends a Read that waits.
  virtual void Cancel() = 0;
};

// Thread-safe. Every call has a deadline; its errors name the call, the address, and the id under
// which the daemon logs it.
class Connection {
 public:
  // Does not wait for a daemon: the first call finds out. Errors: INVALID_ARGUMENT.
  static absl::StatusOr<std::unique_ptr<Connection>> Create(const std::string& address);
  ~Connection();

  const std::string& address() const { return address_; }
  // For calls that go another way than this channel.
  std::string NextRequestId();
  // "CALL at ADDRESS (request ID)", as errors begin.
  std::string Describe(const char* call, const std::string& request_id) const;

  std::unique_ptr<SessionCall> OpenSession();
  absl::StatusOr<v1::AllocateArenaReply> AllocateArena(const v1::AllocateArenaRequest& request,
                                                       const Deadline& deadline);
  absl::StatusOr<v1::RegisterSequenceReply> RegisterSequence(
      const v1::RegisterSequenceRequest& request, const Deadline& deadline);
  absl::StatusOr<v1::IngestTokensReply> IngestTokens(const v1::IngestTokensRequest& request,
                                                     const Deadline& deadline);
  absl::StatusOr<v1::WaitPublishedReply> WaitPublished(const v1::WaitPublishedRequest& request,
                                                       const Deadline& deadline);
  absl::StatusOr<v1::FetchClustersReply> FetchClusters(const v1::FetchClustersRequest& request,
                                                       const Deadline& deadline);
  absl::StatusOr<v1::AuditStepReply> AuditStep(const v1::AuditStepRequest& request,
                                               const Deadline& deadline);
  absl::StatusOr<v1::ReleaseSequenceReply> ReleaseSequence(
      const v1::ReleaseSequenceRequest& request, const Deadline& deadline);
  absl::StatusOr<v1::ListSequencesReply> ListSequences(const v1::ListSequencesRequest& request,
                                                       const Deadline& deadline);
  absl::StatusOr<v1::GetStatusReply> GetStatus(const v1::GetStatusRequest& request,
                                               const Deadline& deadline);

 private:
  struct Stubs;
  Connection(std::string address, std::unique_ptr<Stubs> stubs);

  const std::string address_;
  const std::unique_ptr<Stubs> stubs_;
};

}  // namespace clusterkv::client
