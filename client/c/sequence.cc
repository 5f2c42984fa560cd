// The C interface: sequences.
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/c/arguments.h"
#include "client/c/clusterkv.h"
#include "client/c/handles.h"
#include "client/c/last_error.h"
#include "client/c/method.h"
#include "client/c/tensors.h"
#include "client/client.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::c {
namespace {

static_assert(CLUSTERKV_DTYPE_BF16 == static_cast<uint32_t>(gpu::DType::kBf16));
static_assert(CLUSTERKV_DTYPE_FP16 == static_cast<uint32_t>(gpu::DType::kFp16));
static_assert(CLUSTERKV_DTYPE_FP32 == static_cast<uint32_t>(gpu::DType::kFp32));

absl::StatusOr<FetchMode> ReadMode(uint32_t mode) {
  switch (mode) {
    case CLUSTERKV_MODE_DIRECT:
      return FetchMode::kDirect;
    case CLUSTERKV_MODE_SERVED:
      return FetchMode::kServed;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("mode is ", mode, "; allowed: 1 (direct), 2 (served)"));
  }
}

absl::StatusOr<SequenceOptions> ReadSequenceOptions(const clusterkv_sequence_options* options) {
  CKV_ASSIGN_OR_RETURN(const clusterkv_sequence_options given,
                       ReadStruct(options, CLUSTERKV_SEQUENCE_OPTIONS_INIT));
  CKV_ASSIGN_OR_RETURN(const gpu::MethodOptions method, ReadMethod(given.method));
  CKV_ASSIGN_OR_RETURN(const FetchMode mode, ReadMode(given.mode));
  return SequenceOptions{.shape = {.layers = given.layers,
                                   .kv_heads = given.kv_heads,
                                   .q_heads = given.q_heads,
                                   .head_dim = given.head_dim,
                                   .dtype = static_cast<gpu::DType>(given.dtype)},
                         .method = method,
                         .max_tokens = given.max_tokens,
                         .reserve_tokens = given.reserve_tokens,
                         .mode = mode};
}

absl::Status Register(clusterkv_client* client, const clusterkv_sequence_options* options,
                      clusterkv_sequence** sequence) {
  CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "the result's place"));
  *sequence = nullptr;
  CKV_RETURN_IF_ERROR(CheckNotNull(client, "client"));
  CKV_ASSIGN_OR_RETURN(const SequenceOptions read, ReadSequenceOptions(options));
  auto handle = std::make_unique<clusterkv_sequence>();
  CKV_ASSIGN_OR_RETURN(handle->sequence, client->client->RegisterSequence(read));
  *sequence = handle.release();
  return absl::OkStatus();
}

absl::Status Ingest(clusterkv_sequence* sequence, const clusterkv_range* range,
                    const clusterkv_kv* kv, double timeout_seconds) {
  CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "sequence"));
  CKV_ASSIGN_OR_RETURN(const clusterkv_range given, ReadStruct(range, CLUSTERKV_RANGE_INIT));
  CKV_RETURN_IF_ERROR(CheckSwitch("end_of_prompt", given.end_of_prompt));
  CKV_RETURN_IF_ERROR(CheckReserved(given.reserved));
  CKV_ASSIGN_OR_RETURN(const gpu::KvSource source,
                       ReadKv(kv, sequence->sequence->options().shape, given.count));
  CKV_ASSIGN_OR_RETURN(const absl::Duration timeout,
                       ReadTimeout("timeout_seconds", timeout_seconds));
  return sequence->sequence->Ingest({.position = given.position,
                                     .count = given.count,
                                     .layer_begin = given.layer_begin,
                                     .layer_count = given.layer_count,
                                     .end_of_prompt = given.end_of_prompt == 1},
                                    source, timeout);
}

void Tell(const Published& published, uint32_t* segments, uint32_t* cut) {
  if (segments != nullptr) *segments = published.segments;
  if (cut != nullptr) *cut = published.cut;
}

absl::Status WaitPublished(clusterkv_sequence* sequence, uint32_t length, double timeout_seconds,
                           uint32_t* segments, uint32_t* cut) {
  CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "sequence"));
  CKV_ASSIGN_OR_RETURN(const absl::Duration timeout,
                       ReadTimeout("timeout_seconds", timeout_seconds));
  CKV_ASSIGN_OR_RETURN(const Published published,
                       sequence->sequence->WaitPublished(length, timeout));
  Tell(published, segments, cut);
  return absl::OkStatus();
}

absl::Status GetCounters(const clusterkv_sequence* sequence, uint32_t layer,
                         clusterkv_counters* counters) {
  CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "sequence"));
  CKV_RETURN_IF_ERROR(CheckStruct(counters));
  const uint32_t layers = sequence->sequence->options().shape.layers;
  if (layer >= layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer is ", layer, "; allowed: below ", layers));
  }
  const gpu::LayerCounters read = sequence->sequence->counters(layer);
  WriteStruct({.struct_size = 0,
               .hit_clusters = read.hit_clusters,
               .missed_clusters = read.missed_clusters,
               .hit_tokens = read.hit_tokens,
               .missed_tokens = read.missed_tokens,
               .gathered_bytes = read.gathered_bytes},
              counters);
  return absl::OkStatus();
}

}  // namespace
}  // namespace clusterkv::client::c

using namespace clusterkv::client::c;  // NOLINT(google-build-using-namespace): C has none

extern "C" {

clusterkv_status clusterkv_sequence_register(clusterkv_client* client,
                                             const clusterkv_sequence_options* options,
                                             clusterkv_sequence** sequence) {
  return Guarded([&] { return Register(client, options, sequence); });
}

clusterkv_status clusterkv_sequence_id(const clusterkv_sequence* sequence, uint64_t* id) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "sequence"));
    CKV_RETURN_IF_ERROR(CheckNotNull(id, "id"));
    *id = sequence->sequence->id();
    return absl::OkStatus();
  });
}

clusterkv_status clusterkv_sequence_get_method(const clusterkv_sequence* sequence,
                                               clusterkv_method_options* method) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "sequence"));
    CKV_RETURN_IF_ERROR(CheckStruct(method));
    WriteStruct(DescribeMethod(sequence->sequence->options().method), method);
    return absl::OkStatus();
  });
}

clusterkv_status clusterkv_sequence_length(const clusterkv_sequence* sequence, uint32_t* length) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "sequence"));
    CKV_RETURN_IF_ERROR(CheckNotNull(length, "length"));
    *length = sequence->sequence->length();
    return absl::OkStatus();
  });
}

clusterkv_status clusterkv_sequence_ingest(clusterkv_sequence* sequence,
                                           const clusterkv_range* range, const clusterkv_kv* kv,
                                           double timeout_seconds) {
  return Guarded([&] { return Ingest(sequence, range, kv, timeout_seconds); });
}

clusterkv_status clusterkv_sequence_wait_published(clusterkv_sequence* sequence, uint32_t length,
                                                   double timeout_seconds, uint32_t* segments,
                                                   uint32_t* cut) {
  return Guarded([&] { return WaitPublished(sequence, length, timeout_seconds, segments, cut); });
}

clusterkv_status clusterkv_sequence_published(const clusterkv_sequence* sequence,
                                              uint32_t* segments, uint32_t* cut) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "sequence"));
    Tell(sequence->sequence->published(), segments, cut);
    return absl::OkStatus();
  });
}

clusterkv_status clusterkv_sequence_get_counters(const clusterkv_sequence* sequence, uint32_t layer,
                                                 clusterkv_counters* counters) {
  return Guarded([&] { return GetCounters(sequence, layer, counters); });
}

clusterkv_status clusterkv_sequence_release(clusterkv_sequence* sequence) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(sequence, "sequence"));
    return sequence->sequence->Release();
  });
}

void clusterkv_sequence_destroy(clusterkv_sequence* sequence) {
  if (sequence == nullptr) return;
  // A batch may hold it still, but it is given back now; with a step open, once the batch goes.
  static_cast<void>(Guarded([&] {
    sequence->sequence->Release().IgnoreError();
    return absl::OkStatus();
  }));
  delete sequence;
}

}  // extern "C"
