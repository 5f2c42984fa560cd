// Measuring the cuda backend: events around graph replays in a stream of the bench's own. Built
// only with CLUSTERKV_CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <vector>

#include "client/bench/backend.h"

namespace clusterkv::client::bench {

class CudaBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<Backend>> Create(std::unique_ptr<gpu::Device> device);
  ~CudaBackend() override;

  gpu::Device& device() override { return *device_; }
  gpu::Stream& stream() override { return *stream_; }
  void* native_stream() override { return native_; }
  const std::string& driver() const override { return driver_; }
  absl::StatusOr<std::vector<double>> Time(const Timing& timing) override;
  absl::Status Copy(std::byte* to, const std::byte* from, size_t bytes) override;
  absl::StatusOr<std::unique_ptr<CacheEditor>> MakeEditor(const CacheEdits& edits) override;
  absl::StatusOr<double> MeasureFlops() override;
  absl::StatusOr<std::unique_ptr<Model>> CreateModel(const ModelSize& size,
                                                     uint32_t max_batch) override;

 private:
  explicit CudaBackend(std::unique_ptr<gpu::Device> device) : device_(std::move(device)) {}
  absl::Status Prepare();
  // Enqueues reading more than L2 holds.
  absl::Status ChillCaches();

  const std::unique_ptr<gpu::Device> device_;
  std::string driver_;
  cudaStream_t native_ = nullptr;
  std::unique_ptr<gpu::Stream> stream_;  // over native_
  std::unique_ptr<gpu::DeviceMemory> chill_;
};

}  // namespace clusterkv::client::bench
