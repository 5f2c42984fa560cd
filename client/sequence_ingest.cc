// SequenceImpl: the prompt's way to the daemon and into the sequence's own state.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"
#include "client/ring_layout.h"
#include "client/sequence_impl.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

// Pieces of the ring's quarter keep several in flight.
constexpr uint64_t kPiecesInFlight = 4;

bool Same(const IngestRange& a, const IngestRange& b) {
  return a.position == b.position && a.count == b.count && a.layer_begin == b.layer_begin &&
         a.layer_count == b.layer_count && a.end_of_prompt == b.end_of_prompt;
}

// The source of a part of the range.
gpu::KvSource Offset(gpu::KvSource source, uint32_t layers, uint32_t tokens) {
  const size_t bytes = layers * source.layer_stride + tokens * source.token_stride;
  source.k += bytes;
  source.v += bytes;
  return source;
}

}  // namespace

absl::Status SequenceImpl::CheckSource(const gpu::KvSource& source) const {
  if (source.k != nullptr && source.v != nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("sequence ", id(), ": k or v is null"));
}

absl::Status SequenceImpl::Ingest(const IngestRange& range, const gpu::KvSource& source,
                                  absl::Duration timeout) {
  CKV_RETURN_IF_ERROR(Check());
  CKV_RETURN_IF_ERROR(CheckSource(source));
  const Deadline deadline(timeout);
  if (!unfinished_.has_value() || !Same(*unfinished_, range)) {
    CKV_RETURN_IF_ERROR(Annotate(progress_.Check(range), absl::StrCat("sequence ", id())));
  }
  unfinished_ = range;
  for (const IngestRange& piece : SplitRange(range, options_.shape, options_.method,
                                             session_->ring().bytes() / kPiecesInFlight)) {
    // Handed over by a call before this one, which failed further on.
    if (progress_.Has(piece)) continue;
    CKV_RETURN_IF_ERROR(SendPiece(
        piece,
        Offset(source, piece.layer_begin - range.layer_begin, piece.position - range.position),
        deadline));
    progress_.Advance(piece);
  }
  if (direct()) CKV_RETURN_IF_ERROR(WriteLength());
  unfinished_.reset();
  length_ = progress_.tokens();
  return absl::OkStatus();
}

v1::IngestTokensRequest SequenceImpl::RangeRequest(const IngestRange& range, uint64_t offset) {
  v1::IngestTokensRequest request;
  *request.mutable_session() = session_->reference();
  request.set_sequence_id(id());
  request.set_position(range.position);
  request.set_count(range.count);
  request.set_layer_begin(range.layer_begin);
  request.set_layer_count(range.layer_count);
  request.set_arena_id(session_->ring_arena());
  request.set_ring_offset(offset);
  request.set_end_of_prompt(range.end_of_prompt);
  request.set_idempotency_key(++range_key_);
  return request;
}

absl::Status SequenceImpl::SendPiece(const IngestRange& piece, const gpu::KvSource& source,
                                     const Deadline& deadline) {
  RingAllocator& ring = session_->ring();
  CKV_ASSIGN_OR_RETURN(
      const uint64_t offset,
      ring.Allocate(RangeLayout(options_.shape, piece.layer_count, piece.count).bytes(), deadline));
  absl::Status status = CopyPiece(piece, source, offset);
  if (!status.ok()) {
    ring.Release(offset);
    return status;
  }
  status = session_->SendRange(RangeRequest(piece, offset), session_->RpcDeadline());
  if (status.ok()) return status;
  if (MayHaveHappened(status)) {
    // The daemon may have it or not: no later range could be known to follow.
    link_->Fail(status);
    return status;
  }
  ring.Release(offset);
  return status;
}

absl::Status SequenceImpl::CopyPiece(const IngestRange& piece, const gpu::KvSource& source,
                                     uint64_t offset) {
  const RangeLayout layout(options_.shape, piece.layer_count, piece.count);
  std::byte* const range = session_->ring_data() + offset;
  const ClientSession::StreamLease lease = session_->LeaseStream();
  KvPacker packer(lease.stream);
  absl::Status status;
  for (uint32_t layer = 0; layer < piece.layer_count && status.ok(); ++layer) {
    const gpu::KvSource of_layer = Offset(source, layer, 0);
    StridedRows rows{.data = of_layer.k,
                     .token_stride = source.token_stride,
                     .head_stride = source.head_stride,
                     .tokens = piece.count,
                     .heads = options_.shape.kv_heads,
                     .row_bytes = layout.row_bytes()};
    status = packer.Pack(range + layout.k_offset(layer), rows);
    rows.data = of_layer.v;
    if (status.ok()) status = packer.Pack(range + layout.v_offset(layer), rows);
  }
  // The state takes its share from the ring, where the device reaches it whatever the source is.
  if (status.ok() && direct()) {
    status = session_->device().decode_ops().WriteTokens(
        lease.stream, {.slot = state_slot(),
                       .layer_begin = piece.layer_begin,
                       .layer_count = piece.layer_count,
                       .position = piece.position,
                       .count = piece.count,
                       .source = {.k = range + layout.k_offset(0),
                                  .v = range + layout.v_offset(0),
                                  .layer_stride = layout.k_offset(1) - layout.k_offset(0),
                                  .token_stride = layout.token_bytes(),
                                  .head_stride = layout.row_bytes()}});
  }
  const absl::Status passed = lease.stream.Synchronize();
  return status.ok() ? passed : status;
}

// The length counts what all layers have.
absl::Status SequenceImpl::WriteLength() {
  const ClientSession::StreamLease lease = session_->LeaseStream();
  const absl::Status written = session_->device().decode_ops().WriteTokens(
      lease.stream, {.slot = state_slot(), .length_after = progress_.tokens()});
  const absl::Status passed = lease.stream.Synchronize();
  return written.ok() ? passed : written;
}

}  // namespace clusterkv::client
