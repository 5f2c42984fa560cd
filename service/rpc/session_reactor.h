// The Session stream of one worker: Hello in, events out.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <deque>
#include <memory>
#include <mutex>
#include <string>

#include "clusterkv/v1/session.pb.h"
#include "service/core.h"
#include "service/rpc/rpc_counters.h"

namespace clusterkv::service {

class SessionReactor
    : public CountedReactor<grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionEvent>> {
 public:
  SessionReactor(RpcCounters& counters, ServiceCore& core, grpc::CallbackServerContext& context,
                 std::string attach_path, GrantId grant);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;  // deletes this

 private:
  // What the core holds: it may outlive the reactor.
  class Sink;

  void Welcomed(absl::StatusOr<WelcomeInfo> welcome);
  void Send(v1::SessionEvent event);
  void FinishOnce(const absl::Status& why);

  ServiceCore& core_;
  grpc::CallbackServerContext& context_;
  const std::string attach_path_;
  const GrantId grant_;
  const absl::StatusOr<std::string> request_id_;
  v1::SessionRequest request_;
  bool greeted_ = false;  // reads come one after another

  std::shared_ptr<Sink> sink_;
  std::mutex mu_;
  std::deque<v1::SessionEvent> outgoing_;  // guarded by mu_; the front is being written
  bool finished_ = false;                  // guarded by mu_
  absl::Status why_;                       // guarded by mu_; of finishing
  bool cancelled_ = false;                 // guarded by mu_
  SessionId session_ = 0;                  // guarded by mu_
};

}  // namespace clusterkv::service
