#include "client/client_session.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/address.h"
#include "client/grpc_status.h"
#include "gpu/state_layout.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

constexpr uint32_t kProtocolVersion = 1;
constexpr size_t kMaxNameBytes = 128;
constexpr uint64_t kLeastRingBytes =
    1024;  // two tokens of one layer, one head, d 64, 2 bytes: K, V
constexpr int kSendAttempts = 3;
constexpr absl::Duration kReasonTimeout = absl::Milliseconds(200);

absl::Status CheckOptions(const ClientOptions& options) {
  if (options.name.size() > kMaxNameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("client name has ", options.name.size(),
                                                   " bytes; allowed: at most ", kMaxNameBytes));
  }
  if (options.ring_bytes < kLeastRingBytes) {
    return absl::InvalidArgumentError(absl::StrCat("ring_bytes is ", options.ring_bytes,
                                                   "; allowed: at least ", kLeastRingBytes));
  }
  if (options.rpc_timeout <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("rpc_timeout is not above 0");
  }
  if (!(options.audit_rate >= 0 && options.audit_rate <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("audit_rate is ", options.audit_rate, "; allowed: 0 to 1"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<ClientSession>> ClientSession::Open(const ClientOptions& options) {
  CKV_RETURN_IF_ERROR(CheckOptions(options));
  std::shared_ptr<ClientSession> session(new ClientSession(options));
  const absl::Status opened = session->OpenParts();
  if (opened.ok()) return session;
  session->Close();
  return opened;
}

ClientSession::ClientSession(const ClientOptions& options)
    : options_(options),
      ring_(options.ring_bytes),
      helper_(
          [this](const v1::IngestTokensRequest& request) {
            return SendRange(request, RpcDeadline());
          },
          ring_) {
  if (options.audit_rate <= 0) return;
  audit_ = std::make_unique<AuditHelper>([this](const v1::AuditStepRequest& request) {
    const absl::Status ended = health();
    return ended.ok() ? connection_->AuditStep(request, RpcDeadline()).status() : ended;
  });
}

ClientSession::~ClientSession() { Close(); }

absl::Status ClientSession::OpenParts() {
  const Deadline deadline = RpcDeadline();
  const std::string address = options_.address.empty() ? DefaultAddress() : options_.address;
  CKV_ASSIGN_OR_RETURN(connection_, Connection::Create(address));
  v1::Hello hello;
  hello.set_protocol_version_min(kProtocolVersion);
  hello.set_protocol_version_max(kProtocolVersion);
  hello.add_state_layout_versions(gpu::kStateLayoutVersion);
  hello.set_client_name(options_.name);
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<SessionStream> stream,
                       SessionStream::Open(connection_->OpenSession(), hello, *this, deadline));
  reference_.set_session_token(stream->welcome().session_token());
  reference_.set_boot_epoch(stream->boot_epoch());
  const v1::Welcome& welcome = stream->welcome();
  {
    const std::lock_guard lock(mutex_);
    stream_ = std::move(stream);
  }
  CKV_ASSIGN_OR_RETURN(device_, gpu::CreateDevice({.backend = welcome.backend(),
                                                   .device = welcome.device(),
                                                   .threads = options_.device_threads}));
  CKV_ASSIGN_OR_RETURN(copy_stream_, device_->CreateStream("ckv-copy"));
  attach_path_ = ResolveAttachPath(address, welcome.attach_path());
  AttachOptions attach_options{.path = attach_path_,
                               .session_token = welcome.session_token(),
                               .boot_epoch = reference_.boot_epoch(),
                               .device = device_.get(),
                               .on_lost = [this](const absl::Status& why) { OnAttachLost(why); }};
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<AttachClient> attach,
                       AttachClient::Create(std::move(attach_options), deadline));
  {
    const std::lock_guard lock(mutex_);
    attach_ = std::move(attach);
  }
  CKV_ASSIGN_OR_RETURN(ring_arena_, AllocateArena(options_.ring_bytes));
  return absl::OkStatus();
}

// The order of shutdown, in one place: senders first, then what the daemon lent, then the session.
void ClientSession::Close() {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(closed_, true)) return;
    if (ended_.ok()) ended_ = absl::CancelledError("the client is closed");
  }
  ring_.Close(absl::CancelledError("the client is closed"));
  helper_.Stop();
  if (audit_ != nullptr) audit_->Stop();
  ring_arena_ = {};
  {
    const std::lock_guard lock(mutex_);
    idle_io_.clear();
    audit_ring_.reset();
  }
  if (attach_ != nullptr) attach_->Close();
  if (stream_ != nullptr) stream_->Close();
}

absl::Status ClientSession::health() const {
  const std::lock_guard lock(mutex_);
  return ended_;
}

absl::StatusOr<Arena> ClientSession::AllocateArena(uint64_t bytes) {
  CKV_RETURN_IF_ERROR(health());
  const Deadline deadline = RpcDeadline();
  v1::AllocateArenaRequest request;
  *request.mutable_session() = reference_;
  request.set_bytes(bytes);
  CKV_ASSIGN_OR_RETURN(const v1::AllocateArenaReply reply,
                       connection_->AllocateArena(request, deadline));
  Arena arena{.id = reply.arena_id(), .memory = nullptr};
  CKV_ASSIGN_OR_RETURN(arena.memory, attach_->WaitForArena(arena.id, bytes, deadline));
  return arena;
}

absl::StatusOr<Arena> ClientSession::TakeIoArena(uint64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    const auto fits = std::find_if(idle_io_.begin(), idle_io_.end(), [bytes](const Arena& arena) {
      return arena.memory->bytes() >= bytes;
    });
    if (fits != idle_io_.end()) {
      Arena arena = std::move(*fits);
      idle_io_.erase(fits);
      return arena;
    }
  }
  // Powers of two, so that batches that grow a little find one that fits.
  return AllocateArena(std::bit_ceil(bytes));
}

void ClientSession::ReturnIoArena(Arena arena) {
  const std::lock_guard lock(mutex_);
  if (!closed_) idle_io_.push_back(std::move(arena));
}

FetchCalls ClientSession::OpenFetchCalls() {
  std::unique_ptr<FetchSocket> socket;
  if (!options_.served_by_grpc) {
    auto connected = FetchSocket::Connect(attach_path_, RpcDeadline());
    if (connected.ok()) socket = *std::move(connected);
  }
  return FetchCalls(*connection_, std::move(socket));
}

absl::StatusOr<std::shared_ptr<AuditRing>> ClientSession::AuditRingFor(uint64_t slot_bytes) {
  {
    const std::lock_guard lock(mutex_);
    if (audit_ring_ != nullptr && audit_ring_->bytes() >= slot_bytes) return audit_ring_;
  }
  CKV_ASSIGN_OR_RETURN(Arena arena, AllocateArena(AuditRing::BytesFor(slot_bytes)));
  auto ring = std::make_shared<AuditRing>(std::move(arena));
  const std::lock_guard lock(mutex_);
  if (!closed_) audit_ring_ = ring;
  return ring;
}

absl::Status ClientSession::SendRange(const v1::IngestTokensRequest& request,
                                      const Deadline& deadline) {
  absl::Status status;
  for (int attempt = 0; attempt < kSendAttempts; ++attempt) {
    CKV_RETURN_IF_ERROR(health());
    // A share of the time each, so that one lost reply leaves time to ask again.
    const Deadline share = deadline.Within(options_.rpc_timeout / kSendAttempts);
    status = connection_->IngestTokens(request, share).status();
    if (!MayHaveHappened(status) || deadline.passed()) break;
  }
  return status;
}

void ClientSession::AddSequence(const std::shared_ptr<SequenceLink>& sequence, bool direct) {
  if (direct) ++direct_sequences_;
  const std::lock_guard lock(mutex_);
  sequences_[sequence->id()] = sequence;
}

void ClientSession::RemoveSequence(uint64_t id, bool direct) {
  if (direct) --direct_sequences_;
  const std::lock_guard lock(mutex_);
  sequences_.erase(id);
}

std::shared_ptr<SequenceLink> ClientSession::FindSequence(uint64_t id) const {
  const std::lock_guard lock(mutex_);
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : found->second;
}

void ClientSession::OnEvent(const v1::SessionEvent& event) {
  switch (event.event_case()) {
    case v1::SessionEvent::kCreditReturned:
      // Ranges are only ever of the ring; of one that is not in use there is nothing to give back.
      ring_.Release(event.credit_returned().offset());
      return;
    case v1::SessionEvent::kSegmentPublished: {
      const v1::SegmentPublished& published = event.segment_published();
      if (const auto link = FindSequence(published.sequence_id())) {
        link->Publish({.segments = published.published_segments(), .cut = published.cut()});
      }
      return;
    }
    case v1::SessionEvent::kSequenceFailed: {
      const v1::SequenceFailed& failed = event.sequence_failed();
      const int code =
          failed.code() == 0 ? static_cast<int>(absl::StatusCode::kUnknown) : failed.code();
      if (const auto link = FindSequence(failed.sequence_id())) {
        link->Fail(FromCode(
            code, absl::StrCat("sequence ", failed.sequence_id(), ": ", failed.message())));
      }
      return;
    }
    case v1::SessionEvent::kDraining:
      draining_ = true;
      return;
    case v1::SessionEvent::kWelcome:
    case v1::SessionEvent::EVENT_NOT_SET:
      return;  // a later protocol's word, or a second Welcome: nothing depends on it
  }
}

// The daemon closes both connections when it ends a session; only the stream says why.
void ClientSession::OnAttachLost(const absl::Status& why) {
  if (!stream_->WaitEnded(Deadline(kReasonTimeout))) End(why);
}

void ClientSession::OnStreamEnded(const absl::Status& why) { End(why); }

void ClientSession::End(const absl::Status& why) {
  AttachClient* attach = nullptr;
  {
    const std::lock_guard lock(mutex_);
    if (!ended_.ok()) return;
    ended_ = why;
    if (stream_ != nullptr) stream_->Cancel();
    attach = attach_.get();
  }
  ring_.Close(why);
  if (attach != nullptr) attach->Fail(why);
}

}  // namespace clusterkv::client
