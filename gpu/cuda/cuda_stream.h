// A CUDA stream of ours or of the caller's, with what the decode kernels need beside it: the
// batch's table and scratch in device memory, and a pinned word in which kernels report faults.
//
// Differs from the host's stream in one thing: work after a fault that a kernel reported still
// runs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cuda/kernels/batch_table.h"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"

namespace clusterkv::gpu::cuda {

class CudaStream final : public Stream {
 public:
  // `pool` is where temporaries come from; it must outlive the stream.
  static absl::StatusOr<std::unique_ptr<CudaStream>> Create(int ordinal, cudaMemPool_t pool,
                                                            const std::string& name);
  // Enqueues on `stream`, which stays the caller's and must outlive this.
  static absl::StatusOr<std::unique_ptr<CudaStream>> Wrap(int ordinal, cudaMemPool_t pool,
                                                          cudaStream_t stream);
  ~CudaStream() override;

  absl::Status CopyAsync(void* destination, const void* source, size_t bytes) override;
  absl::StatusOr<std::unique_ptr<Event>> Record() override;
  absl::Status Synchronize() override;

  // The batch as the kernels will see it, loaded if it differs from the last one's. Errors:
  // INVALID_ARGUMENT (too many slots), RESOURCE_EXHAUSTED, FAILED_PRECONDITION (the stream is being
  // captured, and the batch differs: a graph would load it at every replay).
  struct LoadedBatch {
    BatchShape shape;
    uint32_t clusters = 0;  // the most of any slot
    uint32_t parts = 0;     // of Attend, likewise
    uint32_t chunks = 0;    // of the host store, likewise
  };
  absl::StatusOr<LoadedBatch> Load(Batch batch);

  // Copies host bytes into device memory that lives until the stream has passed `Discard`.
  absl::StatusOr<std::byte*> Upload(const void* source, size_t bytes);
  absl::StatusOr<std::byte*> TakeTemporary(size_t bytes);
  void Discard(std::byte* temporary);

  cudaStream_t native() const { return stream_; }
  int ordinal() const { return ordinal_; }
  uint32_t* fault() const { return reinterpret_cast<uint32_t*>(fault_->data()); }

 private:
  CudaStream(int ordinal, cudaMemPool_t pool, cudaStream_t stream, bool owned)
      : ordinal_(ordinal), pool_(pool), stream_(stream), owned_(owned) {}
  absl::Status Prepare();
  absl::Status GrowScratch(const LoadedBatch& batch, uint32_t group, DecodeScratch& scratch);
  absl::Status TakeFault();

  const int ordinal_;
  const cudaMemPool_t pool_;
  const cudaStream_t stream_;
  const bool owned_;
  int multiprocessors_ = 0;
  bool overlap_ = false;
  std::unique_ptr<DeviceMemory> fault_;  // pinned: [0] KernelFault, [1] value

  std::mutex mutex_;
  // Guarded by mutex_.
  std::unique_ptr<DeviceMemory> table_;    // BatchTable; made with the first batch
  std::unique_ptr<DeviceMemory> scratch_;  // grows
  std::vector<DeviceSlot> slots_;          // as last loaded
  LoadedBatch loaded_;
};

// What the operations check of their arguments. Errors: INVALID_ARGUMENT.
absl::StatusOr<CudaStream*> NativeStream(Stream& stream);
absl::Status CheckCudaDType(DType dtype);  // bf16 or fp16
// A kernel that follows a pointer into pageable memory kills the context for all that share it.
absl::Status CheckReachable(const void* data, const char* what);

}  // namespace clusterkv::gpu::cuda
