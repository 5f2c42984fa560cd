#include "client/batch_served.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

// gRPC takes 4 MiB, and copies it more than once: about a millisecond for each.
constexpr uint64_t kMaxInlineBytes = 1 << 20;
constexpr uint64_t kArenaAlignment = 64;
constexpr uint64_t kMaxVarintBytes = 10;  // of a position

uint64_t Aligned(uint64_t bytes) {
  return (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
}

// Rows of one token, packed by the CPU.
void PackInline(std::string* bytes, const StridedRows& rows) {
  bytes->resize(rows.heads * rows.row_bytes);
  for (uint32_t head = 0; head < rows.heads; ++head) {
    std::memcpy(bytes->data() + head * rows.row_bytes, rows.data + head * rows.head_stride,
                rows.row_bytes);
  }
}

}  // namespace

ServedBatch::ItemLayout::ItemLayout(const gpu::Shape& shape) {
  const uint64_t row = uint64_t{shape.head_dim} * gpu::SizeOf(shape.dtype);
  q_bytes = shape.q_heads * row;
  kv_bytes = shape.kv_heads * row;
  output_bytes = uint64_t{shape.q_heads} * (shape.head_dim + 1) * sizeof(float);
  q = 0;
  k = q + Aligned(q_bytes);
  v = k + Aligned(kv_bytes);
  output = v + Aligned(kv_bytes);
  bytes = output + Aligned(output_bytes);
}

absl::StatusOr<std::unique_ptr<DecodeBatch>> ServedBatch::Create(
    std::vector<SequenceImpl*> sequences, const BatchOptions& options) {
  if (options.captured) {
    return absl::InvalidArgumentError("a served batch cannot be captured: its steps are RPCs");
  }
  std::unique_ptr<ServedBatch> batch(new ServedBatch(std::move(sequences), options));
  // Only the device's own stream reaches what lies in its memory.
  if (batch->item_.bytes * batch->step_.sequences().size() > kMaxInlineBytes ||
      !batch->session_.device().computes_on_host_memory()) {
    CKV_RETURN_IF_ERROR(batch->OpenArena());
  }
  return batch;
}

ServedBatch::ServedBatch(std::vector<SequenceImpl*> sequences, const BatchOptions& options)
    : step_(std::move(sequences)),
      options_(options),
      session_(step_.sequences().front()->session()),
      item_(step_.shape()),
      calls_(session_.OpenFetchCalls()),
      selected_(step_.sequences().size()) {}

ServedBatch::~ServedBatch() {
  if (uses_arena() && !in_doubt_) session_.ReturnIoArena(std::move(arena_));
}

absl::Status ServedBatch::OpenArena() {
  CKV_ASSIGN_OR_RETURN(stream_, session_.device().CreateStream("ckv-served"));
  CKV_ASSIGN_OR_RETURN(arena_, session_.TakeIoArena(item_.bytes * step_.sequences().size()));
  return absl::OkStatus();
}

absl::Status ServedBatch::Prepare(uint32_t /*budget_tokens*/) {
  return absl::FailedPreconditionError("a served batch cannot be captured");
}

absl::Status ServedBatch::Complete() {
  return absl::FailedPreconditionError("a served batch cannot be captured");
}

absl::Status ServedBatch::Begin(uint32_t budget_tokens) {
  CKV_RETURN_IF_ERROR(step_.CheckBegin(budget_tokens));
  step_.Open(budget_tokens);
  return absl::OkStatus();
}

absl::Status ServedBatch::Append(uint32_t layer, const gpu::KvSource& source) {
  CKV_RETURN_IF_ERROR(step_.CheckAppend(layer, source));
  source_ = source;
  step_.Appended();
  return absl::OkStatus();
}

absl::Status ServedBatch::PlaceInput(v1::TensorRef* place, const StridedRows& rows,
                                     uint64_t offset) {
  if (!uses_arena()) {
    PackInline(place->mutable_inline_(), rows);
    return absl::OkStatus();
  }
  v1::ArenaRange* const range = place->mutable_arena();
  range->set_arena_id(arena_.id);
  range->set_offset(offset);
  range->set_bytes(rows.heads * rows.row_bytes);
  return KvPacker(*stream_).Pack(arena_.memory->data() + offset, rows);
}

absl::StatusOr<v1::FetchClustersRequest> ServedBatch::MakeRequest(uint32_t layer,
                                                                  const gpu::QuerySource& queries) {
  const gpu::Shape& shape = step_.shape();
  v1::FetchClustersRequest request;
  *request.mutable_session() = session_.reference();
  request.set_layer(layer);
  request.set_budget_tokens(step_.budget_tokens());
  request.set_want_output(true);
  request.set_want_selection(options_.want_selection);
  StridedRows q{.data = queries.q,
                .token_stride = 0,
                .head_stride = queries.head_stride,
                .tokens = 1,
                .heads = shape.q_heads,
                .row_bytes = shape.head_dim * gpu::SizeOf(shape.dtype)};
  StridedRows k = q;
  k.data = source_.k;
  k.head_stride = source_.head_stride;
  k.heads = shape.kv_heads;
  StridedRows v = k;
  v.data = source_.v;
  uint64_t base = 0;
  for (const SequenceImpl* const sequence : step_.sequences()) {
    v1::FetchItem* const item = request.add_items();
    item->set_sequence_id(sequence->id());
    item->set_position(sequence->length());
    CKV_RETURN_IF_ERROR(PlaceInput(item->mutable_q(), q, base + item_.q));
    CKV_RETURN_IF_ERROR(PlaceInput(item->mutable_k(), k, base + item_.k));
    CKV_RETURN_IF_ERROR(PlaceInput(item->mutable_v(), v, base + item_.v));
    if (uses_arena()) {
      item->mutable_output_arena()->set_arena_id(arena_.id);
      item->mutable_output_arena()->set_offset(base + item_.output);
      item->mutable_output_arena()->set_bytes(item_.output_bytes);
    }
    base += item_.bytes;
    q.data += queries.batch_stride;
    k.data += source_.batch_stride;
    v.data += source_.batch_stride;
  }
  // The daemon reads the arena as soon as it has the request.
  if (uses_arena()) CKV_RETURN_IF_ERROR(stream_->Synchronize());
  return request;
}

uint64_t ServedBatch::AnswerBytes() const {
  const uint64_t outputs = uses_arena() ? 0 : item_.output_bytes;
  const uint64_t selected =
      options_.want_selection ? uint64_t{step_.shape().kv_heads} * step_.budget_tokens() : 0;
  return step_.sequences().size() * (outputs + selected * kMaxVarintBytes);
}

absl::Status ServedBatch::Attend(uint32_t layer, const gpu::QuerySource& queries,
                                 const gpu::AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(step_.CheckAttend(layer, queries, target));
  CKV_RETURN_IF_ERROR(session_.health());
  CKV_ASSIGN_OR_RETURN(v1::FetchClustersRequest request, MakeRequest(layer, queries));
  const absl::StatusOr<v1::FetchClustersReply> reply =
      calls_.Call(std::move(request), AnswerBytes(), session_.RpcDeadline());
  if (!reply.ok()) {
    in_doubt_ = MayHaveHappened(reply.status());
    return reply.status();
  }
  in_doubt_ = false;
  CKV_RETURN_IF_ERROR(TakeReply(layer, *reply, target));
  step_.Attended();
  return absl::OkStatus();
}

absl::Status ServedBatch::CheckReply(const v1::FetchClustersReply& reply) const {
  const size_t count = step_.sequences().size();
  if (static_cast<size_t>(reply.results_size()) != count) {
    return absl::InternalError(absl::StrCat("FetchClusters: ", reply.results_size(),
                                            " results for ", count, " sequences"));
  }
  const gpu::Shape& shape = step_.shape();
  const size_t out_bytes = size_t{shape.q_heads} * shape.head_dim * sizeof(float);
  const size_t selected = size_t{shape.kv_heads} * step_.budget_tokens();
  for (size_t i = 0; i < count; ++i) {
    const v1::FetchResult& result = reply.results(static_cast<int>(i));
    const bool outputs = uses_arena() || (result.output().size() == out_bytes &&
                                          result.lse().size() == shape.q_heads * sizeof(float));
    const bool selection = !options_.want_selection ||
                           static_cast<size_t>(result.selected_positions_size()) == selected;
    if (result.sequence_id() != step_.sequences()[i]->id() || !outputs || !selection) {
      return absl::InternalError(absl::StrCat("FetchClusters: result ", i, " is not of sequence ",
                                              step_.sequences()[i]->id(),
                                              " or has other sizes than asked for"));
    }
  }
  return absl::OkStatus();
}

absl::Status ServedBatch::TakeReply(uint32_t layer, const v1::FetchClustersReply& reply,
                                    const gpu::AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(CheckReply(reply));
  CKV_RETURN_IF_ERROR(CopyOutputs(reply, target));
  for (size_t i = 0; i < step_.sequences().size(); ++i) {
    const v1::FetchResult& result = reply.results(static_cast<int>(i));
    step_.sequences()[i]->AddCounters(layer, {.hit_clusters = result.hit_clusters(),
                                              .missed_clusters = result.missed_clusters(),
                                              .hit_tokens = result.hit_tokens(),
                                              .missed_tokens = result.missed_tokens(),
                                              .gathered_bytes = result.gathered_bytes()});
    selected_[i].assign(result.selected_positions().begin(), result.selected_positions().end());
  }
  return absl::OkStatus();
}

absl::Status ServedBatch::CopyOutputs(const v1::FetchClustersReply& reply,
                                      const gpu::AttentionTarget& target) {
  const gpu::Shape& shape = step_.shape();
  const size_t row_bytes = shape.head_dim * sizeof(float);
  const size_t lse_bytes = shape.q_heads * sizeof(float);
  // From the arena by the device's stream, from a message by the CPU.
  const auto copy = [&](void* to, const void* from, size_t bytes) -> absl::Status {
    if (uses_arena()) return stream_->CopyAsync(to, from, bytes);
    std::memcpy(to, from, bytes);
    return absl::OkStatus();
  };
  for (size_t i = 0; i < step_.sequences().size(); ++i) {
    const v1::FetchResult& result = reply.results(static_cast<int>(i));
    const char* out = result.output().data();
    const char* lse = result.lse().data();
    if (uses_arena()) {
      out = reinterpret_cast<const char*>(arena_.memory->data() + i * item_.bytes + item_.output);
      lse = out + shape.q_heads * row_bytes;
    }
    float* const own = target.out + i * target.batch_stride;
    if (target.head_stride == shape.head_dim) {
      CKV_RETURN_IF_ERROR(copy(own, out, shape.q_heads * row_bytes));
    } else {
      for (uint32_t head = 0; head < shape.q_heads; ++head) {
        CKV_RETURN_IF_ERROR(
            copy(own + head * target.head_stride, out + head * row_bytes, row_bytes));
      }
    }
    if (target.lse == nullptr) continue;
    CKV_RETURN_IF_ERROR(copy(target.lse + i * target.lse_batch_stride, lse, lse_bytes));
  }
  return uses_arena() ? stream_->Synchronize() : absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> ServedBatch::Selection(size_t index) {
  if (!options_.want_selection) {
    return absl::FailedPreconditionError("the batch was made without want_selection");
  }
  if (index >= selected_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", index, " of a batch of ", selected_.size()));
  }
  if (!step_.open() || !step_.attended_any()) {
    return absl::FailedPreconditionError("no layer of an open step has been attended");
  }
  return selected_[index];
}

absl::Status ServedBatch::End() {
  CKV_RETURN_IF_ERROR(step_.CheckEnd());
  step_.Finish();
  return absl::OkStatus();
}

}  // namespace clusterkv::client
