// The model by cuBLAS and a few kernels, bf16. Built only with CLUSTERKV_CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "client/bench/cublas.h"
#include "client/bench/model.h"
#include "gpu/device.h"

namespace clusterkv::client::bench {

class CudaModel final : public Model {
 public:
  // Errors: UNAVAILABLE without cuBLAS, RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<Model>> Create(gpu::Device& device, cudaStream_t stream,
                                                       const ModelSize& size, uint32_t max_batch);

  absl::Status Begin(uint32_t batch) override;
  absl::Status Project(uint32_t layer, uint32_t batch) override;
  gpu::QuerySource queries() const override;
  gpu::KvSource tokens() const override;
  gpu::AttentionTarget target() const override;
  absl::Status Finish(uint32_t layer, uint32_t batch) override;
  absl::Status Logits(uint32_t batch) override;

 private:
  struct LayerWeights {
    std::byte *qkv, *output, *gate_up, *down;
  };

  CudaModel(gpu::Device& device, cudaStream_t stream, const ModelSize& size)
      : device_(device), stream_(stream), size_(size) {}
  absl::Status Prepare(uint32_t max_batch);
  absl::StatusOr<std::byte*> Allocate(size_t bytes);
  // [outputs][inner], so that outputs have the inputs' variance.
  absl::StatusOr<std::byte*> RandomWeights(uint32_t outputs, uint32_t inner);
  uint32_t qkv_width() const { return size_.q_width() + 2 * size_.kv_width(); }

  gpu::Device& device_;
  const cudaStream_t stream_;
  const ModelSize size_;
  std::unique_ptr<Cublas> cublas_;
  std::vector<std::unique_ptr<gpu::DeviceMemory>> memory_;
  std::vector<LayerWeights> layers_;
  std::byte* vocabulary_ = nullptr;
  uint32_t seed_ = 0;
  // Activations [max_batch][...], bf16 unless said.
  float* first_ = nullptr;     // [hidden] fp32: what a step begins with
  float* residual_ = nullptr;  // [hidden] fp32
  std::byte* normal_ = nullptr;
  std::byte* qkv_ = nullptr;
  float* attended_ = nullptr;  // [q_width] fp32
  std::byte* rounded_ = nullptr;
  std::byte* added_ = nullptr;  // [hidden]: of the output projection or the feed-forward
  std::byte* gate_up_ = nullptr;
  std::byte* activated_ = nullptr;
  std::byte* logits_ = nullptr;
};

}  // namespace clusterkv::client::bench
