#include "client/bench/cuda_graph.h"

#include "gpu/cuda/cuda_error.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {

absl::StatusOr<TimedEvent> TimedEvent::Create() {
  cudaEvent_t event = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(cudaEventCreate(&event), "event");
  return TimedEvent(event);
}

TimedEvent::~TimedEvent() {
  if (event_ != nullptr) (void)cudaEventDestroy(event_);
}

absl::Status TimedEvent::Record(cudaStream_t stream) const {
  return gpu::cuda::ToStatus(cudaEventRecord(event_, stream), "event");
}

absl::StatusOr<double> TimedEvent::MicrosecondsUntil(const TimedEvent& later) const {
  float milliseconds = 0.0f;
  CKV_RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&milliseconds, event_, later.event_), "event");
  return 1e3 * static_cast<double>(milliseconds);
}

absl::StatusOr<CapturedWork> CapturedWork::Capture(gpu::Stream& stream, cudaStream_t native,
                                                   const Enqueue& work) {
  CKV_RETURN_IF_CUDA_ERROR(cudaStreamBeginCapture(native, cudaStreamCaptureModeThreadLocal),
                           "beginning a capture");
  const absl::Status enqueued = work(stream);
  cudaGraph_t graph = nullptr;
  const absl::Status ended =
      gpu::cuda::ToStatus(cudaStreamEndCapture(native, &graph), "ending a capture");
  cudaGraphExec_t executable = nullptr;
  absl::Status status = enqueued.ok() ? ended : enqueued;
  if (status.ok()) {
    status = gpu::cuda::ToStatus(cudaGraphInstantiate(&executable, graph, 0), "making a graph");
  }
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  CKV_RETURN_IF_ERROR(status);
  return CapturedWork(executable);
}

CapturedWork::~CapturedWork() {
  if (executable_ != nullptr) (void)cudaGraphExecDestroy(executable_);
}

absl::Status CapturedWork::Launch(cudaStream_t native) const {
  return gpu::cuda::ToStatus(cudaGraphLaunch(executable_, native), "replaying a graph");
}

}  // namespace clusterkv::client::bench
