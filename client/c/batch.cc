// The C interface: batches.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/c/arguments.h"
#include "client/c/clusterkv.h"
#include "client/c/handles.h"
#include "client/c/last_error.h"
#include "client/c/tensors.h"
#include "client/client.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::c {
namespace {

absl::StatusOr<BatchOptions> ReadBatchOptions(const clusterkv_batch_options* options) {
  const clusterkv_batch_options defaults = CLUSTERKV_BATCH_OPTIONS_INIT;
  CKV_ASSIGN_OR_RETURN(const clusterkv_batch_options given,
                       ReadStruct(options != nullptr ? options : &defaults, defaults));
  CKV_RETURN_IF_ERROR(CheckSwitch("want_selection", given.want_selection));
  CKV_RETURN_IF_ERROR(CheckSwitch("captured", given.captured));
  BatchOptions read;
  read.want_selection = given.want_selection == 1;
  read.stream = given.cuda_stream;
  read.captured = given.captured == 1;
  return read;
}

absl::Status Create(clusterkv_client* client, clusterkv_sequence* const* sequences, size_t count,
                    const clusterkv_batch_options* options, clusterkv_batch** batch) {
  CKV_RETURN_IF_ERROR(CheckNotNull(batch, "the result's place"));
  *batch = nullptr;
  CKV_RETURN_IF_ERROR(CheckNotNull(client, "client"));
  CKV_RETURN_IF_ERROR(CheckNotNull(sequences, "sequences"));
  CKV_ASSIGN_OR_RETURN(const BatchOptions read, ReadBatchOptions(options));
  auto handle = std::make_unique<clusterkv_batch>();
  std::vector<Sequence*> members;
  for (size_t i = 0; i < count; ++i) {
    CKV_RETURN_IF_ERROR(CheckNotNull(sequences[i], absl::StrCat("sequences[", i, "]").c_str()));
    handle->sequences.push_back(sequences[i]->sequence);
    members.push_back(sequences[i]->sequence.get());
  }
  CKV_ASSIGN_OR_RETURN(handle->batch, client->client->CreateBatch(members, read));
  *batch = handle.release();
  return absl::OkStatus();
}

absl::Status Append(clusterkv_batch* batch, uint32_t layer, const clusterkv_kv* kv) {
  CKV_RETURN_IF_ERROR(CheckNotNull(batch, "batch"));
  CKV_ASSIGN_OR_RETURN(const gpu::KvSource source, ReadKv(kv, batch->shape(), /*tokens=*/1));
  return batch->batch->Append(layer, source);
}

absl::Status Attend(clusterkv_batch* batch, uint32_t layer, const clusterkv_attention* attention) {
  CKV_RETURN_IF_ERROR(CheckNotNull(batch, "batch"));
  CKV_ASSIGN_OR_RETURN(const Attention read, ReadAttention(attention, batch->shape()));
  return batch->batch->Attend(layer, read.queries, read.target);
}

absl::Status Select(clusterkv_batch* batch, size_t index, int32_t* positions, size_t capacity,
                    size_t* count) {
  CKV_RETURN_IF_ERROR(CheckNotNull(batch, "batch"));
  if (capacity > 0) CKV_RETURN_IF_ERROR(CheckNotNull(positions, "positions"));
  CKV_ASSIGN_OR_RETURN(const std::vector<int32_t> selection, batch->batch->Selection(index));
  if (count != nullptr) *count = selection.size();
  if (capacity < selection.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("capacity is ", capacity, "; needed: ", selection.size()));
  }
  std::copy(selection.begin(), selection.end(), positions);
  return absl::OkStatus();
}

}  // namespace
}  // namespace clusterkv::client::c

using namespace clusterkv::client::c;  // NOLINT(google-build-using-namespace): C has none

extern "C" {

clusterkv_status clusterkv_batch_create(clusterkv_client* client,
                                        clusterkv_sequence* const* sequences, size_t count,
                                        const clusterkv_batch_options* options,
                                        clusterkv_batch** batch) {
  return Guarded([&] { return Create(client, sequences, count, options, batch); });
}

clusterkv_status clusterkv_batch_prepare(clusterkv_batch* batch, uint32_t budget_tokens) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(batch, "batch"));
    return batch->batch->Prepare(budget_tokens);
  });
}

clusterkv_status clusterkv_batch_complete(clusterkv_batch* batch) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(batch, "batch"));
    return batch->batch->Complete();
  });
}

clusterkv_status clusterkv_batch_begin(clusterkv_batch* batch, uint32_t budget_tokens) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(batch, "batch"));
    return batch->batch->Begin(budget_tokens);
  });
}

clusterkv_status clusterkv_batch_append(clusterkv_batch* batch, uint32_t layer,
                                        const clusterkv_kv* kv) {
  return Guarded([&] { return Append(batch, layer, kv); });
}

clusterkv_status clusterkv_batch_attend(clusterkv_batch* batch, uint32_t layer,
                                        const clusterkv_attention* attention) {
  return Guarded([&] { return Attend(batch, layer, attention); });
}

clusterkv_status clusterkv_batch_selection(clusterkv_batch* batch, size_t index, int32_t* positions,
                                           size_t capacity, size_t* count) {
  return Guarded([&] { return Select(batch, index, positions, capacity, count); });
}

clusterkv_status clusterkv_batch_end(clusterkv_batch* batch) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(batch, "batch"));
    return batch->batch->End();
  });
}

void clusterkv_batch_destroy(clusterkv_batch* batch) { delete batch; }

}  // extern "C"
