#include "client/replay/device_trace.h"

#include <utility>

#include "gpu/status_macros.h"

namespace clusterkv::client::replay {
namespace {

absl::StatusOr<std::unique_ptr<gpu::DeviceMemory>> CopyOf(gpu::Device& device, gpu::Stream& stream,
                                                          const std::byte* data, size_t bytes) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::DeviceMemory> memory, device.Allocate(bytes));
  CKV_RETURN_IF_ERROR(stream.CopyAsync(memory->data(), data, bytes));
  return memory;
}

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceTrace>> DeviceTrace::Create(gpu::Device& device,
                                                                 const Trace& trace) {
  CKV_ASSIGN_OR_RETURN(const std::unique_ptr<gpu::Stream> stream, device.CreateStream("ckv-trace"));
  auto tensors = std::make_unique<DeviceTrace>();
  const size_t kv_bytes = trace.tokens() * trace.kv_token_bytes();
  const size_t q_bytes = trace.steps() * trace.q_step_bytes();
  for (const TraceLayer& layer : trace.layers()) {
    Layer own;
    CKV_ASSIGN_OR_RETURN(own.k, CopyOf(device, *stream, layer.k, kv_bytes));
    CKV_ASSIGN_OR_RETURN(own.v, CopyOf(device, *stream, layer.v, kv_bytes));
    CKV_ASSIGN_OR_RETURN(own.q, CopyOf(device, *stream, layer.q, q_bytes));
    tensors->layers_.push_back(std::move(own));
  }
  CKV_RETURN_IF_ERROR(stream->Synchronize());
  return tensors;
}

}  // namespace clusterkv::client::replay
