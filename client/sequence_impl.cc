#include "client/sequence_impl.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"
#include "client/wire_conversion.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

// Decoded tokens that gather before they are handed over: few RPCs, and little of the ring.
constexpr uint32_t kFlushTokens = 32;
// A destructor waits no longer than this for a daemon that does not answer.
constexpr absl::Duration kReleaseTimeout = absl::Seconds(5);

v1::RegisterSequenceRequest RegisterRequest(ClientSession& session,
                                            const SequenceOptions& options) {
  v1::RegisterSequenceRequest request;
  *request.mutable_session() = session.reference();
  *request.mutable_shape() = ToWire(options.shape);
  *request.mutable_method() = ToWire(options.method);
  request.set_max_tokens(options.max_tokens);
  request.set_reserve_tokens(options.reserve_tokens);
  request.set_mode(ToWire(options.mode));
  request.set_idempotency_key(session.NextKey());
  return request;
}

// What of a registration depends on this session. Direct decode keeps a token of all layers in the
// ring while the one before it is on its way.
absl::Status CheckRing(const SequenceOptions& options, uint64_t ring_bytes) {
  const bool direct = options.mode == FetchMode::kDirect;
  const uint64_t token_bytes = options.shape.token_bytes();
  const uint64_t least = 2 * (direct ? token_bytes : token_bytes / options.shape.layers);
  if (ring_bytes >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("ring_bytes is ", ring_bytes, "; allowed for this shape: at least ", least,
                   direct ? " (2 tokens of all layers)" : " (2 tokens of one layer)"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Sequence>> SequenceImpl::Register(
    const std::shared_ptr<ClientSession>& session, const SequenceOptions& options) {
  CKV_RETURN_IF_ERROR(session->health());
  CKV_RETURN_IF_ERROR(options.shape.Validate());
  CKV_RETURN_IF_ERROR(options.method.Validate());
  SequenceOptions resolved = options;
  resolved.method = options.method.Resolved(options.shape);
  CKV_ASSIGN_OR_RETURN(
      const gpu::StateLayout layout,
      gpu::StateLayout::Create(resolved.shape, resolved.method, resolved.max_tokens));
  CKV_RETURN_IF_ERROR(CheckRing(resolved, session->ring().bytes()));
  if (session->draining()) return absl::UnavailableError("the daemon is draining");

  const Deadline deadline = session->RpcDeadline();
  CKV_ASSIGN_OR_RETURN(
      const v1::RegisterSequenceReply reply,
      session->connection().RegisterSequence(RegisterRequest(*session, resolved), deadline));
  auto link = std::make_shared<SequenceLink>(reply.sequence_id(), resolved.method.sink_tokens);
  session->AddSequence(link, resolved.mode == FetchMode::kDirect);
  // From here on its destructor gives the sequence back.
  std::unique_ptr<SequenceImpl> sequence(
      new SequenceImpl(session, resolved, layout, std::move(link), reply.generation()));
  if (resolved.mode == FetchMode::kServed) return sequence;
  if (reply.state_bytes() != layout.total_bytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("the daemon's state of the sequence has ", reply.state_bytes(),
                     " bytes, this library's ", layout.total_bytes, ": different layouts"));
  }
  CKV_ASSIGN_OR_RETURN(sequence->state_, session->attach().WaitForArena(
                                             reply.state_arena_id(), layout.total_bytes, deadline));
  return sequence;
}

SequenceImpl::SequenceImpl(std::shared_ptr<ClientSession> session, const SequenceOptions& options,
                           const gpu::StateLayout& layout, std::shared_ptr<SequenceLink> link,
                           uint32_t generation)
    : session_(std::move(session)),
      options_(options),
      layout_(layout),
      link_(std::move(link)),
      generation_(generation),
      progress_(options.shape.layers, options.max_tokens),
      plan_(options.method),
      tail_(options.shape, session_->ring()),
      counters_(options.shape.layers) {}

SequenceImpl::~SequenceImpl() { Release().IgnoreError(); }

absl::Status SequenceImpl::Check() const {
  CKV_RETURN_IF_ERROR(session_->health());
  if (released_) {
    return absl::FailedPreconditionError(absl::StrCat("sequence ", id(), " is released"));
  }
  return link_->failure();
}

bool SequenceImpl::KnownPublished(uint32_t length) {
  if (!progress_.ended() && (length == 0 || length > progress_.tokens())) return false;
  if (length == 0) length = progress_.tokens();
  while (const auto segment = plan_.Next(length, progress_.prompt_tokens())) {
    plan_.Advance(*segment);
  }
  return link_->published().cut >= plan_.cut();
}

absl::StatusOr<Published> SequenceImpl::WaitPublished(uint32_t length, absl::Duration timeout) {
  CKV_RETURN_IF_ERROR(Check());
  if (length > options_.max_tokens) {
    return absl::OutOfRangeError(absl::StrCat("sequence ", id(), ": length ", length, " of ",
                                              options_.max_tokens, " max_tokens"));
  }
  // Served, the daemon also has to have taken in tokens that no segment needs yet.
  if (direct() && KnownPublished(length)) return link_->published();
  const Deadline deadline(timeout);
  CKV_RETURN_IF_ERROR(FlushTail(deadline));
  v1::WaitPublishedRequest request;
  *request.mutable_session() = session_->reference();
  request.set_sequence_id(id());
  request.set_length(length);
  CKV_ASSIGN_OR_RETURN(const v1::WaitPublishedReply reply,
                       session_->connection().WaitPublished(request, deadline));
  link_->Publish({.segments = reply.published_segments(), .cut = reply.cut()});
  return link_->published();
}

std::vector<gpu::LayerCounters> SequenceImpl::ReadCounters() const {
  std::vector<gpu::LayerCounters> counters(layout_.layers);
  const ClientSession::StreamLease lease = session_->LeaseStream();
  const absl::Status copied =
      lease.stream.CopyAsync(counters.data(), state_->data() + layout_.counters,
                             counters.size() * sizeof(gpu::LayerCounters));
  const absl::Status passed = lease.stream.Synchronize();
  // A device that cannot copy has failed the steps before; the last known stays.
  return copied.ok() && passed.ok() ? counters : counters_;
}

gpu::LayerCounters SequenceImpl::counters(uint32_t layer) const {
  if (layer >= layout_.layers) return {};
  return state_ == nullptr ? counters_[layer] : ReadCounters()[layer];
}

absl::Status SequenceImpl::Release() {
  if (released_) return absl::OkStatus();
  if (step_open_) {
    return absl::FailedPreconditionError(absl::StrCat("sequence ", id(), ": a step is open"));
  }
  released_ = true;
  session_->helper().Forget(*link_);
  if (session_->audit() != nullptr) session_->audit()->Flush(Deadline(kReleaseTimeout));
  tail_.Drop();
  if (state_ != nullptr) counters_ = ReadCounters();
  state_.reset();
  session_->RemoveSequence(id(), direct());
  CKV_RETURN_IF_ERROR(session_->health());  // its end has given the sequence back
  v1::ReleaseSequenceRequest request;
  *request.mutable_session() = session_->reference();
  request.set_sequence_id(id());
  const absl::Status status =
      session_->connection()
          .ReleaseSequence(request, session_->RpcDeadline().Within(kReleaseTimeout))
          .status();
  return absl::IsNotFound(status) ? absl::OkStatus() : status;
}

gpu::BatchSlot SequenceImpl::state_slot() const {
  return {.state = state_->data(),
          .layout = &layout_,
          .host_chunks = session_->attach().chunk_bases(),
          .chunk_count = session_->attach().chunk_count(),
          .generation = generation_,
          .active = 1};
}

gpu::BatchSlot SequenceImpl::slot() const {
  gpu::BatchSlot slot = state_slot();
  slot.tail = tail_.token(session_->ring_data());
  slot.tail_stride = tail_.stride();
  return slot;
}

absl::Status SequenceImpl::CheckStep() const {
  CKV_RETURN_IF_ERROR(Check());
  const std::string who = absl::StrCat("sequence ", id());
  if (step_open_) return absl::FailedPreconditionError(who + ": a step is open");
  if (!progress_.ended()) {
    return absl::FailedPreconditionError(absl::StrCat(who, ": the prompt has not ended"));
  }
  if (length_ >= options_.max_tokens) {
    return absl::OutOfRangeError(
        absl::StrCat(who, " has ", length_, " of ", options_.max_tokens, " max_tokens"));
  }
  // What is known here may lag behind the daemon, never run ahead.
  const uint32_t cut = link_->published().cut;
  const uint32_t window = length_ + 1 > cut ? length_ + 1 - cut : 0;
  if (window > layout_.window_slots) {
    return absl::ResourceExhaustedError(
        absl::StrCat(who, ": the step needs ", window, " window slots of ", layout_.window_slots,
                     " until the daemon has published beyond position ", cut));
  }
  return absl::OkStatus();
}

void SequenceImpl::FinishStep() {
  step_open_ = false;
  ++length_;
  if (!direct()) return;
  tail_.Commit();
  if (tail_.full()) SubmitTail();
}

void SequenceImpl::AbandonStep(const absl::Status& why) {
  step_open_ = false;
  link_->Fail(Annotate(why, absl::StrCat("sequence ", id(), ": a step failed")));
}

void SequenceImpl::AddCounters(uint32_t layer, const gpu::LayerCounters& added) {
  gpu::LayerCounters& sum = counters_[layer];
  sum.hit_clusters += added.hit_clusters;
  sum.missed_clusters += added.missed_clusters;
  sum.hit_tokens += added.hit_tokens;
  sum.missed_tokens += added.missed_tokens;
  sum.gathered_bytes += added.gathered_bytes;
}

uint32_t SequenceImpl::TailCapacity() const {
  // Two ranges for each direct sequence: one that fills, one on its way.
  const uint64_t share =
      session_->ring().bytes() / (2 * std::max(1u, session_->direct_sequences()));
  const uint64_t tokens = share / options_.shape.token_bytes();
  return static_cast<uint32_t>(std::clamp<uint64_t>(
      tokens, 1, std::min(kFlushTokens, options_.method.decode_segment_tokens)));
}

absl::Status SequenceImpl::ReserveTail() {
  const absl::Status reserved = tail_.Reserve(length_, TailCapacity());
  return Annotate(reserved, absl::StrCat("sequence ", id()));
}

void SequenceImpl::SubmitTail() {
  const DecodeTail::Range range = tail_.Take();
  session_->helper().Submit(link_, RangeRequest({.position = range.position,
                                                 .count = range.count,
                                                 .layer_begin = 0,
                                                 .layer_count = options_.shape.layers,
                                                 .end_of_prompt = false},
                                                range.offset));
}

absl::Status SequenceImpl::FlushTail(const Deadline& deadline) {
  if (!direct() || step_open_) return absl::OkStatus();
  if (!tail_.empty()) {
    const ClientSession::StreamLease lease = session_->LeaseStream();
    KvPacker packer(lease.stream);
    const absl::Status moved = tail_.Compact(packer, session_->ring_data());
    const absl::Status passed = lease.stream.Synchronize();
    // Half moved, its tokens are lost to the daemon.
    if (!moved.ok() || !passed.ok()) link_->Fail(moved.ok() ? passed : moved);
    CKV_RETURN_IF_ERROR(link_->failure());
    SubmitTail();
  }
  return session_->helper().Flush(*link_, deadline);
}

}  // namespace clusterkv::client
