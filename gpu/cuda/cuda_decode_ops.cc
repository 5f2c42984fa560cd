#include "gpu/cuda/cuda_decode_ops.h"

#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/cuda/cuda_memory.h"
#include "gpu/cuda/cuda_stream.h"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/decode_checks.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::cuda {
namespace {

absl::Status CheckDTypes(Batch batch) {
  for (const BatchSlot& slot : batch) {
    if (slot.active != 0) CKV_RETURN_IF_ERROR(CheckCudaDType(slot.layout->dtype));
  }
  return absl::OkStatus();
}

absl::Status CheckSource(const KvSource& source) {
  CKV_RETURN_IF_ERROR(CheckReachable(source.k, "k"));
  return CheckReachable(source.v, "v");
}

TokenSource ToLaunch(const KvSource& source) {
  return {.k = source.k,
          .v = source.v,
          .batch_stride = source.batch_stride,
          .layer_stride = source.layer_stride,
          .token_stride = source.token_stride,
          .head_stride = source.head_stride};
}

QueryLaunch ToLaunch(const QuerySource& queries) {
  return {.q = queries.q, .batch_stride = queries.batch_stride, .head_stride = queries.head_stride};
}

OutputLaunch ToLaunch(const AttentionTarget& target) {
  return {.out = target.out,
          .batch_stride = target.batch_stride,
          .head_stride = target.head_stride,
          .lse = target.lse,
          .lse_batch_stride = target.lse_batch_stride};
}

absl::Status CheckTarget(const AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(CheckReachable(target.out, "out"));
  return target.lse == nullptr ? absl::OkStatus() : CheckReachable(target.lse, "lse");
}

// A batch is ready for its launches: `body(native, loaded)`, unless no slot is active.
template <typename Body>
absl::Status WithBatch(Stream& stream, Batch batch, const char* what, const Body& body) {
  CKV_ASSIGN_OR_RETURN(CudaStream* const native, NativeStream(stream));
  CKV_RETURN_IF_ERROR(CheckDTypes(batch));
  CKV_ASSIGN_OR_RETURN(const CudaStream::LoadedBatch loaded, native->Load(batch));
  if (loaded.shape.kv_heads == 0) return absl::OkStatus();
  const ScopedDevice device(native->ordinal());
  return ToStatus(body(*native, loaded), what);
}

}  // namespace

absl::Status CudaDecodeOps::WriteTokens(Stream& stream, const WriteTokensArgs& args) {
  CKV_RETURN_IF_ERROR(CheckWriteTokens(args));
  CKV_ASSIGN_OR_RETURN(CudaStream* const native, NativeStream(stream));
  if (args.slot.active == 0) return absl::OkStatus();
  CKV_RETURN_IF_ERROR(CheckCudaDType(args.slot.layout->dtype));
  if (args.count > 0 && args.layer_count > 0) CKV_RETURN_IF_ERROR(CheckSource(args.source));
  WriteTokensLaunch launch = {};
  launch.slot.state = args.slot.state;
  launch.slot.generation = args.slot.generation;
  launch.slot.active = 1;
  launch.slot.block = *args.slot.layout;
  launch.source = ToLaunch(args.source);
  launch.layer_begin = args.layer_begin;
  launch.layer_count = args.layer_count;
  launch.position = args.position;
  launch.count = args.count;
  launch.length_after = args.length_after;
  const ScopedDevice device(native->ordinal());
  return ToStatus(LaunchWriteTokens(launch, native->native()), "writing tokens");
}

absl::Status CudaDecodeOps::LoadBatch(Stream& stream, Batch batch) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, 0));
  return WithBatch(stream, batch, "loading a batch",
                   [](CudaStream&, const CudaStream::LoadedBatch&) { return cudaSuccess; });
}

absl::Status CudaDecodeOps::BeginStep(Stream& stream, Batch batch) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, 0));
  return WithBatch(stream, batch, "beginning a step",
                   [](CudaStream& native, const CudaStream::LoadedBatch& loaded) {
                     return LaunchBeginStep(loaded.shape, native.native());
                   });
}

absl::Status CudaDecodeOps::Append(Stream& stream, Batch batch, uint32_t layer,
                                   const KvSource& source) {
  CKV_RETURN_IF_ERROR(CheckAppend(batch, layer, source));
  CKV_RETURN_IF_ERROR(CheckSource(source));
  return WithBatch(stream, batch, "appending",
                   [&](CudaStream& native, const CudaStream::LoadedBatch& loaded) {
                     return LaunchAppend(loaded.shape, layer, ToLaunch(source), native.native());
                   });
}

absl::Status CudaDecodeOps::Select(Stream& stream, Batch batch, uint32_t layer,
                                   const QuerySource& queries, uint32_t budget_tokens) {
  CKV_RETURN_IF_ERROR(CheckSelect(batch, layer, queries, budget_tokens));
  CKV_RETURN_IF_ERROR(CheckReachable(queries.q, "q"));
  return WithBatch(stream, batch, "selecting",
                   [&](CudaStream& native, const CudaStream::LoadedBatch& loaded) {
                     return LaunchSelect(loaded.shape, layer, ToLaunch(queries), budget_tokens,
                                         loaded.clusters, native.native());
                   });
}

absl::Status CudaDecodeOps::Fetch(Stream& stream, Batch batch, uint32_t layer) {
  CKV_RETURN_IF_ERROR(CheckBatch(batch, layer));
  return WithBatch(stream, batch, "fetching",
                   [&](CudaStream& native, const CudaStream::LoadedBatch& loaded) {
                     return LaunchFetch(loaded.shape, layer, native.native());
                   });
}

absl::Status CudaDecodeOps::Attend(Stream& stream, Batch batch, uint32_t layer,
                                   const QuerySource& queries, const AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(CheckAttend(batch, layer, queries, target));
  CKV_RETURN_IF_ERROR(CheckReachable(queries.q, "q"));
  CKV_RETURN_IF_ERROR(CheckTarget(target));
  return WithBatch(stream, batch, "attending",
                   [&](CudaStream& native, const CudaStream::LoadedBatch& loaded) {
                     return LaunchAttend(loaded.shape, layer, ToLaunch(queries), ToLaunch(target),
                                         loaded.parts, native.native());
                   });
}

absl::Status CudaDecodeOps::DecodeLayer(Stream& stream, Batch batch, uint32_t layer,
                                        const QuerySource& queries, uint32_t budget_tokens,
                                        const AttentionTarget& target) {
  CKV_RETURN_IF_ERROR(CheckSelect(batch, layer, queries, budget_tokens));
  CKV_RETURN_IF_ERROR(CheckAttend(batch, layer, queries, target));
  CKV_RETURN_IF_ERROR(CheckReachable(queries.q, "q"));
  CKV_RETURN_IF_ERROR(CheckTarget(target));
  return WithBatch(stream, batch, "decoding a layer",
                   [&](CudaStream& native, const CudaStream::LoadedBatch& loaded) {
                     const BatchShape& shape = loaded.shape;
                     const QueryLaunch from = ToLaunch(queries);
                     const OutputLaunch to = ToLaunch(target);
                     if (shape.overlap && budget_tokens <= kMostLayerBudget) {
                       return LaunchDecodeLayer(shape, layer, from, budget_tokens, to,
                                                loaded.clusters, native.native());
                     }
                     cudaError_t error = LaunchSelect(shape, layer, from, budget_tokens,
                                                      loaded.clusters, native.native());
                     if (error == cudaSuccess) error = LaunchFetch(shape, layer, native.native());
                     if (error != cudaSuccess) return error;
                     return LaunchAttend(shape, layer, from, to, loaded.parts, native.native());
                   });
}

absl::Status CudaDecodeOps::EndStep(Stream& stream, Batch batch, absl::Span<uint32_t> errors) {
  CKV_RETURN_IF_ERROR(CheckResults(batch, 0, errors.size()));
  std::fill_n(errors.begin(), batch.size(), 0);
  cudaPointerAttributes attributes = {};
  if (!batch.empty()) (void)cudaPointerGetAttributes(&attributes, errors.data());
  const bool pinned = attributes.type == cudaMemoryTypeHost;
  uint32_t* target = errors.data();
  std::byte* temporary = nullptr;
  CKV_ASSIGN_OR_RETURN(CudaStream* const native, NativeStream(stream));
  if (!pinned) {
    CKV_ASSIGN_OR_RETURN(temporary, native->TakeTemporary(batch.size() * sizeof(uint32_t)));
    target = reinterpret_cast<uint32_t*>(temporary);
    // Where no slot is active nothing is launched.
    const ScopedDevice device(native->ordinal());
    (void)cudaMemsetAsync(temporary, 0, batch.size() * sizeof(uint32_t), native->native());
  }
  absl::Status status = WithBatch(stream, batch, "ending a step",
                                  [&](CudaStream& own, const CudaStream::LoadedBatch& loaded) {
                                    return LaunchEndStep(loaded.shape, target, own.native());
                                  });
  if (temporary == nullptr) return status;
  if (status.ok()) {
    status = native->CopyAsync(errors.data(), temporary, batch.size() * sizeof(uint32_t));
  }
  native->Discard(temporary);
  return status;
}

absl::Status CudaDecodeOps::ReportLayer(Stream& stream, Batch batch, uint32_t layer,
                                        absl::Span<LayerReport> reports) {
  CKV_RETURN_IF_ERROR(CheckResults(batch, layer, reports.size()));
  std::fill_n(reports.begin(), batch.size(), LayerReport{});
  return WithBatch(stream, batch, "reporting a layer",
                   [&](CudaStream& native, const CudaStream::LoadedBatch& loaded) {
                     return LaunchReportLayer(loaded.shape, layer, reports.data(), native.native());
                   });
}

}  // namespace clusterkv::gpu::cuda
