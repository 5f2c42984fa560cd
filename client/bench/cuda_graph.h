// Owners of what cuda timing makes: events and graphs. Built only with CLUSTERKV_CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/bench/backend.h"

namespace clusterkv::client::bench {

// With time stamps. Move-only.
class TimedEvent {
 public:
  static absl::StatusOr<TimedEvent> Create();
  TimedEvent(TimedEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  TimedEvent& operator=(TimedEvent&&) = delete;
  ~TimedEvent();

  absl::Status Record(cudaStream_t stream) const;
  absl::StatusOr<double> MicrosecondsUntil(const TimedEvent& later) const;

 private:
  explicit TimedEvent(cudaEvent_t event) : event_(event) {}
  cudaEvent_t event_ = nullptr;
};

// What `work` enqueues on `stream`, which wraps `native`, captured once. Move-only.
class CapturedWork {
 public:
  static absl::StatusOr<CapturedWork> Capture(gpu::Stream& stream, cudaStream_t native,
                                              const Enqueue& work);
  CapturedWork(CapturedWork&& other) noexcept
      : executable_(std::exchange(other.executable_, nullptr)) {}
  CapturedWork& operator=(CapturedWork&&) = delete;
  ~CapturedWork();

  absl::Status Launch(cudaStream_t native) const;

 private:
  explicit CapturedWork(cudaGraphExec_t executable) : executable_(executable) {}
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace clusterkv::client::bench
