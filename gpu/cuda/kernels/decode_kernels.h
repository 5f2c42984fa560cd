// Launches of a decode step's kernels. All of one batch agree on kv_heads, group and head_dim; what
// differs from sequence to sequence the kernels read from the table. Each returns the launch's
// error. Cost and method stand in the .cu files.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "gpu/cuda/kernels/batch_table.h"

namespace clusterkv::gpu::cuda {

// The same for all launches of a batch.
struct BatchShape {
  const BatchTable* table = nullptr;
  uint32_t* fault = nullptr;  // pinned: [0] KernelFault, [1] value
  uint32_t count = 0;         // slots
  uint32_t kv_heads = 0;
  uint32_t group = 0;  // query heads that share a KV head
  uint32_t head_dim = 0;
  bool bf16 = false;  // else fp16
  int multiprocessors = 0;
  bool overlap = false;  // see overlapped_launch.cuh
};

// Writes `count` slots of the table, from `first` on, and its header.
struct LoadBatchArgs {
  static constexpr uint32_t kSlotsPerLaunch = 8;
  BatchTable* table;
  uint32_t first, count, total;
  DecodeScratch scratch;
  DeviceSlot slots[kSlotsPerLaunch];
};
cudaError_t LaunchLoadBatch(const LoadBatchArgs& args, cudaStream_t stream);

struct TokenSource {
  const std::byte* k;
  const std::byte* v;
  uint64_t batch_stride, layer_stride, token_stride, head_stride;  // bytes
};

struct WriteTokensLaunch {
  DeviceSlot slot;
  TokenSource source;
  uint32_t layer_begin, layer_count, position, count, length_after;
};
cudaError_t LaunchWriteTokens(const WriteTokensLaunch& args, cudaStream_t stream);

cudaError_t LaunchBeginStep(const BatchShape& shape, cudaStream_t stream);
cudaError_t LaunchAppend(const BatchShape& shape, uint32_t layer, const TokenSource& source,
                         cudaStream_t stream);
// errors: [count], device-accessible.
cudaError_t LaunchEndStep(const BatchShape& shape, uint32_t* errors, cudaStream_t stream);

// reports: [count], device-accessible.
cudaError_t LaunchReportLayer(const BatchShape& shape, uint32_t layer, LayerReport* reports,
                              cudaStream_t stream);

struct QueryLaunch {
  const std::byte* q;
  uint64_t batch_stride, head_stride;  // bytes
};
// `clusters` is the most that any slot can have: it shapes the grid.
cudaError_t LaunchSelect(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                         uint32_t budget_tokens, uint32_t clusters, cudaStream_t stream);

cudaError_t LaunchFetch(const BatchShape& shape, uint32_t layer, cudaStream_t stream);

struct OutputLaunch {
  float* out;
  uint64_t batch_stride, head_stride;  // floats
  float* lse;                          // null: not wanted
  uint64_t lse_batch_stride;           // floats
};
// `parts` of kRowsPerPart rows are the most that any slot can have.
cudaError_t LaunchAttend(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                         const OutputLaunch& target, uint32_t parts, cudaStream_t stream);

// Select, Fetch and Attend in one launch; leaves no slot table. Compute capability 9.0 and later.
constexpr uint32_t kMostLayerBudget = 8192;
cudaError_t LaunchDecodeLayer(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                              uint32_t budget_tokens, const OutputLaunch& target, uint32_t clusters,
                              cudaStream_t stream);

}  // namespace clusterkv::gpu::cuda
