// Measuring the host backend: a steady clock around enqueue and synchronise.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "client/bench/backend.h"
#include "gpu/host/thread_pool.h"

namespace clusterkv::client::bench {

class HostBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<Backend>> Create(std::unique_ptr<gpu::Device> device);

  gpu::Device& device() override { return *device_; }
  gpu::Stream& stream() override { return *stream_; }
  void* native_stream() override { return nullptr; }
  const std::string& driver() const override { return driver_; }
  absl::StatusOr<std::vector<double>> Time(const Timing& timing) override;
  absl::Status Copy(std::byte* to, const std::byte* from, size_t bytes) override;
  absl::StatusOr<std::unique_ptr<CacheEditor>> MakeEditor(const CacheEdits& edits) override;
  absl::StatusOr<double> MeasureFlops() override;
  absl::StatusOr<std::unique_ptr<Model>> CreateModel(const ModelSize& size,
                                                     uint32_t max_batch) override;

 private:
  HostBackend(std::unique_ptr<gpu::Device> device, std::unique_ptr<gpu::Stream> stream);

  const std::unique_ptr<gpu::Device> device_;
  const std::unique_ptr<gpu::Stream> stream_;
  const std::string driver_;
  gpu::host::ThreadPool threads_;
};

}  // namespace clusterkv::client::bench
