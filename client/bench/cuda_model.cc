#include "client/bench/cuda_model.h"

#include <cmath>
#include <utility>

#include "client/bench/model_kernels.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {

absl::StatusOr<std::unique_ptr<Model>> CudaModel::Create(gpu::Device& device, cudaStream_t stream,
                                                         const ModelSize& size,
                                                         uint32_t max_batch) {
  if (size.shape.dtype != gpu::DType::kBf16) {
    return absl::UnavailableError("the model of decode is bf16 only");
  }
  std::unique_ptr<CudaModel> model(new CudaModel(device, stream, size));
  CKV_RETURN_IF_ERROR(model->Prepare(max_batch));
  return model;
}

absl::StatusOr<std::byte*> CudaModel::Allocate(size_t bytes) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::DeviceMemory> memory, device_.Allocate(bytes));
  memory_.push_back(std::move(memory));
  return memory_.back()->data();
}

absl::StatusOr<std::byte*> CudaModel::RandomWeights(uint32_t outputs, uint32_t inner) {
  const size_t count = size_t{outputs} * inner;
  CKV_ASSIGN_OR_RETURN(std::byte* const weights, Allocate(2 * count));
  const float scale = std::sqrt(3.0f / static_cast<float>(inner));
  CKV_RETURN_IF_CUDA_ERROR(LaunchRandomBf16(weights, count, scale, ++seed_, stream_), "weights");
  return weights;
}

absl::Status CudaModel::Prepare(uint32_t max_batch) {
  CKV_ASSIGN_OR_RETURN(cublas_, Cublas::Load(device_, stream_));
  for (uint32_t layer = 0; layer < size_.shape.layers; ++layer) {
    LayerWeights& weights = layers_.emplace_back();
    CKV_ASSIGN_OR_RETURN(weights.qkv, RandomWeights(qkv_width(), size_.hidden));
    CKV_ASSIGN_OR_RETURN(weights.output, RandomWeights(size_.hidden, size_.q_width()));
    CKV_ASSIGN_OR_RETURN(weights.gate_up, RandomWeights(2 * size_.feed_forward, size_.hidden));
    CKV_ASSIGN_OR_RETURN(weights.down, RandomWeights(size_.hidden, size_.feed_forward));
  }
  CKV_ASSIGN_OR_RETURN(vocabulary_, RandomWeights(size_.vocabulary, size_.hidden));
  const size_t batch = max_batch;
  CKV_ASSIGN_OR_RETURN(std::byte* const first, Allocate(4 * batch * size_.hidden));
  CKV_ASSIGN_OR_RETURN(std::byte* const residual, Allocate(4 * batch * size_.hidden));
  CKV_ASSIGN_OR_RETURN(std::byte* const attended, Allocate(4 * batch * size_.q_width()));
  first_ = reinterpret_cast<float*>(first);
  residual_ = reinterpret_cast<float*>(residual);
  attended_ = reinterpret_cast<float*>(attended);
  CKV_ASSIGN_OR_RETURN(normal_, Allocate(2 * batch * size_.hidden));
  CKV_ASSIGN_OR_RETURN(qkv_, Allocate(2 * batch * qkv_width()));
  CKV_ASSIGN_OR_RETURN(rounded_, Allocate(2 * batch * size_.q_width()));
  CKV_ASSIGN_OR_RETURN(added_, Allocate(2 * batch * size_.hidden));
  CKV_ASSIGN_OR_RETURN(gate_up_, Allocate(4 * batch * size_.feed_forward));
  CKV_ASSIGN_OR_RETURN(activated_, Allocate(2 * batch * size_.feed_forward));
  CKV_ASSIGN_OR_RETURN(logits_, Allocate(2 * batch * size_.vocabulary));
  // The tokens' embeddings: added once to zeros, they are a step's first residual.
  CKV_RETURN_IF_CUDA_ERROR(LaunchRandomBf16(added_, batch * size_.hidden, 1.0f, ++seed_, stream_),
                           "embeddings");
  return gpu::cuda::ToStatus(
      LaunchAddAndNormalize(first_, added_, normal_, max_batch, size_.hidden, stream_),
      "embeddings");
}

absl::Status CudaModel::Begin(uint32_t batch) {
  CKV_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(residual_, first_, sizeof(float) * batch * size_.hidden,
                                           cudaMemcpyDeviceToDevice, stream_),
                           "embeddings");
  return gpu::cuda::ToStatus(
      LaunchAddAndNormalize(residual_, nullptr, normal_, batch, size_.hidden, stream_), "norm");
}

absl::Status CudaModel::Project(uint32_t layer, uint32_t batch) {
  return cublas_->Multiply(layers_[layer].qkv, normal_, qkv_, batch, qkv_width(), size_.hidden);
}

gpu::QuerySource CudaModel::queries() const {
  return {.q = qkv_,
          .batch_stride = size_t{2} * qkv_width(),
          .head_stride = size_t{2} * size_.shape.head_dim};
}

gpu::KvSource CudaModel::tokens() const {
  const std::byte* const k = qkv_ + size_t{2} * size_.q_width();
  return {.k = k,
          .v = k + size_t{2} * size_.kv_width(),
          .batch_stride = size_t{2} * qkv_width(),
          .head_stride = size_t{2} * size_.shape.head_dim};
}

gpu::AttentionTarget CudaModel::target() const {
  return {.out = attended_,
          .batch_stride = size_.q_width(),
          .head_stride = size_.shape.head_dim,
          .lse = nullptr};
}

absl::Status CudaModel::Finish(uint32_t layer, uint32_t batch) {
  const LayerWeights& weights = layers_[layer];
  const uint32_t hidden = size_.hidden, width = size_.feed_forward;
  CKV_RETURN_IF_CUDA_ERROR(
      LaunchToBf16(attended_, rounded_, size_t{batch} * size_.q_width(), stream_), "rounding");
  CKV_RETURN_IF_ERROR(
      cublas_->Multiply(weights.output, rounded_, added_, batch, hidden, size_.q_width()));
  CKV_RETURN_IF_CUDA_ERROR(
      LaunchAddAndNormalize(residual_, added_, normal_, batch, hidden, stream_), "norm");
  CKV_RETURN_IF_ERROR(
      cublas_->Multiply(weights.gate_up, normal_, gate_up_, batch, 2 * width, hidden));
  CKV_RETURN_IF_CUDA_ERROR(LaunchSiluTimes(gate_up_, activated_, batch, width, stream_), "silu");
  CKV_RETURN_IF_ERROR(cublas_->Multiply(weights.down, activated_, added_, batch, hidden, width));
  return gpu::cuda::ToStatus(
      LaunchAddAndNormalize(residual_, added_, normal_, batch, hidden, stream_), "norm");
}

absl::Status CudaModel::Logits(uint32_t batch) {
  return cublas_->Multiply(vocabulary_, normal_, logits_, batch, size_.vocabulary, size_.hidden);
}

}  // namespace clusterkv::client::bench
