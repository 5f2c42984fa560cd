#include "service/rpc/session_reactor.h"

#include <fmt/format.h>
#include <grpcpp/server_context.h>

#include <utility>

#include "service/rpc/convert.h"
#include "service/rpc/grpc_status.h"
#include "service/rpc/request_id.h"

namespace clusterkv::service {
namespace {

// A worker that lets this many events lie is stuck.
constexpr size_t kMaxOutgoing = 65536;

}  // namespace

class SessionReactor::Sink : public SessionSink {
 public:
  Sink(SessionReactor& reactor, ServiceCore& core) : core_(core), reactor_(&reactor) {}

  void CreditReturned(ArenaId arena, uint64_t offset, uint64_t bytes) override {
    v1::SessionEvent event;
    event.mutable_credit_returned()->set_arena_id(arena);
    event.mutable_credit_returned()->set_offset(offset);
    event.mutable_credit_returned()->set_bytes(bytes);
    Forward(std::move(event));
  }
  void SegmentPublished(SequenceId sequence, PublishedInfo info) override {
    v1::SessionEvent event;
    event.mutable_segment_published()->set_sequence_id(sequence);
    event.mutable_segment_published()->set_published_segments(info.segments);
    event.mutable_segment_published()->set_cut(info.cut);
    Forward(std::move(event));
  }
  void SequenceFailed(SequenceId sequence, const absl::Status& why) override {
    v1::SessionEvent event;
    event.mutable_sequence_failed()->set_sequence_id(sequence);
    event.mutable_sequence_failed()->set_code(static_cast<int>(why.code()));
    event.mutable_sequence_failed()->set_message(std::string(why.message()));
    Forward(std::move(event));
  }
  void Draining(uint64_t deadline_milliseconds) override {
    v1::SessionEvent event;
    event.mutable_draining()->set_deadline_milliseconds(deadline_milliseconds);
    Forward(std::move(event));
  }
  void Ended(const absl::Status& why) override {
    std::lock_guard lock(mu_);
    if (reactor_ != nullptr) reactor_->FinishOnce(why);
  }
  void Welcomed(absl::StatusOr<WelcomeInfo> welcome) {
    std::lock_guard lock(mu_);
    if (reactor_ != nullptr) return reactor_->Welcomed(std::move(welcome));
    // The stream was done before the session was there, so nobody else will end it.
    if (welcome.ok()) core_.EndSession(welcome->session, absl::AbortedError("the worker has gone"));
  }
  void Detach() {
    std::lock_guard lock(mu_);
    reactor_ = nullptr;
  }

 private:
  void Forward(v1::SessionEvent event) {
    std::lock_guard lock(mu_);
    if (reactor_ != nullptr) reactor_->Send(std::move(event));
  }

  ServiceCore& core_;
  std::mutex mu_;
  SessionReactor* reactor_;  // guarded by mu_; null once the stream is done
};

SessionReactor::SessionReactor(RpcCounters& counters, ServiceCore& core,
                               grpc::CallbackServerContext& context, std::string attach_path,
                               GrantId grant)
    : CountedReactor(counters, "Session"),
      core_(core),
      context_(context),
      attach_path_(std::move(attach_path)),
      grant_(grant),
      request_id_(RequestId(context)),
      sink_(std::make_shared<Sink>(*this, core)) {
  if (request_id_.ok()) {
    StartRead(&request_);
  } else {
    FinishOnce(request_id_.status());
  }
}

void SessionReactor::OnReadDone(bool ok) {
  if (!ok) {  // the worker has closed its side, or is gone
    SessionId session = 0;
    {
      std::lock_guard lock(mu_);
      cancelled_ = true;
      session = session_;
    }
    if (session != 0) {
      core_.EndSession(session, absl::AbortedError("the worker has closed the Session stream"));
    } else if (!greeted_) {
      FinishOnce(absl::InvalidArgumentError("the stream ended without Hello"));
    }
    return;
  }
  if (request_.event_case() != v1::SessionRequest::kHello || greeted_) {
    const absl::Status why = greeted_
                                 ? absl::AbortedError("a second message on the Session stream")
                                 : absl::InvalidArgumentError("the first message must be Hello");
    SessionId session = 0;
    {
      std::lock_guard lock(mu_);
      session = session_;
    }
    if (session != 0) return core_.EndSession(session, why, SessionEnd::kProtocolError);
    return FinishOnce(why);
  }
  greeted_ = true;
  HelloInfo hello = FromProto(request_.hello());
  hello.grant = grant_;
  hello.request_id = *request_id_;
  core_.OpenSession(std::move(hello), sink_, [sink = sink_](absl::StatusOr<WelcomeInfo> welcome) {
    sink->Welcomed(std::move(welcome));
  });
  StartRead(&request_);
}

void SessionReactor::Welcomed(absl::StatusOr<WelcomeInfo> welcome) {
  if (!welcome.ok()) return FinishOnce(welcome.status());
  bool gone = false;
  {
    std::lock_guard lock(mu_);
    session_ = welcome->session;
    gone = cancelled_ || finished_;
  }
  if (gone) {
    return core_.EndSession(welcome->session, absl::AbortedError("the worker has gone"));
  }
  v1::SessionEvent event;
  v1::Welcome& message = *event.mutable_welcome();
  message.set_protocol_version(welcome->protocol_version);
  message.set_state_layout_version(welcome->state_layout_version);
  message.set_backend(core_.backend());
  message.set_device(core_.device_uuid());
  message.set_session_id(welcome->session);
  message.set_session_token(welcome->token);
  message.set_attach_path(attach_path_);
  message.set_host_chunk_bytes(core_.chunk_bytes());
  Send(std::move(event));
}

void SessionReactor::Send(v1::SessionEvent event) {
  event.set_boot_epoch(core_.boot_epoch());
  SessionId stuck = 0;
  {
    std::lock_guard lock(mu_);
    if (finished_) return;
    if (outgoing_.size() >= kMaxOutgoing) {
      stuck = session_;
    } else {
      outgoing_.push_back(std::move(event));
      if (outgoing_.size() == 1) StartWrite(&outgoing_.front());
    }
  }
  if (stuck != 0) {
    core_.EndSession(
        stuck, absl::AbortedError(fmt::format("the worker has not read {} events", kMaxOutgoing)),
        SessionEnd::kProtocolError);
  }
}

void SessionReactor::OnWriteDone(bool ok) {
  absl::Status why;
  {
    std::lock_guard lock(mu_);
    outgoing_.pop_front();
    // After a failed write the read ends too, and that ends the session.
    if (!finished_) {
      if (ok && !outgoing_.empty()) StartWrite(&outgoing_.front());
      return;
    }
    outgoing_.clear();
    why = why_;
  }
  Answer(ToGrpcStatus(why));
}

void SessionReactor::OnCancel() {
  SessionId session = 0;
  {
    std::lock_guard lock(mu_);
    cancelled_ = true;
    session = session_;
  }
  if (session != 0) {
    core_.EndSession(session, absl::AbortedError("the Session stream has broken"));
  } else {
    FinishOnce(absl::CancelledError("the worker has gone"));
  }
}

// gRPC takes one write at a time, and the end is one: a write in flight goes first, and what
// finishes then may delete this.
void SessionReactor::FinishOnce(const absl::Status& why) {
  const std::string id = request_id_.value_or("refused");
  bool failed_call = false;  // what ends a session is logged with the session
  bool now = false;
  {
    std::lock_guard lock(mu_);
    if (std::exchange(finished_, true)) return;
    why_ = why;
    failed_call = !why.ok() && session_ == 0;
    if (!why.ok() && request_id_.ok()) context_.AddTrailingMetadata(kRequestIdKey, id);
    now = outgoing_.empty();
    if (outgoing_.size() >= kMaxOutgoing) context_.TryCancel();  // the worker does not read
  }
  if (failed_call) LogFailedCall("Session", id, why);
  if (now) Answer(ToGrpcStatus(why));
}

void SessionReactor::OnDone() {
  sink_->Detach();
  SessionId session = 0;
  {
    std::lock_guard lock(mu_);
    session = session_;
  }
  if (session != 0) core_.EndSession(session, absl::AbortedError("the Session stream has ended"));
  delete this;
}

}  // namespace clusterkv::service
