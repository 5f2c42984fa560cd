// The host device, whose staging, k-means, permuting, steps, allocations and audits' copies wait at
// a gate or fail when a test says so.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "gpu/cluster_ops.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/host/host_stream.h"
#include "gpu/status_macros.h"

namespace clusterkv::service {

// Thread-safe. Open at first.
class Gate {
 public:
  void Close() {
    std::lock_guard lock(mu_);
    open_ = false;
  }
  void Open() {
    {
      std::lock_guard lock(mu_);
      open_ = true;
    }
    changed_.notify_all();
  }
  void Pass() {
    std::unique_lock lock(mu_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_ || admit_; });
    --waiting_;
    admit_ = false;
    changed_.notify_all();
  }
  // Lets one pass the closed gate. Returns when it has.
  void Admit() {
    std::unique_lock lock(mu_);
    admit_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !admit_; });
  }
  // Until somebody waits at the closed gate.
  void AwaitArrival() {
    std::unique_lock lock(mu_);
    changed_.wait(lock, [this] { return waiting_ > 0; });
  }

 private:
  std::mutex mu_;
  std::condition_variable changed_;  // with mu_
  bool open_ = true;                 // guarded by mu_
  bool admit_ = false;               // guarded by mu_
  int waiting_ = 0;                  // guarded by mu_
};

class GatedStream : public gpu::Stream {
 public:
  // `gate` and `fail` outlive it.
  GatedStream(std::unique_ptr<gpu::Stream> stream, Gate& gate, const std::atomic<bool>& fail)
      : stream_(std::move(stream)), gate_(gate), fail_(fail) {}

  absl::Status CopyAsync(void* destination, const void* source, size_t bytes) override {
    gate_.Pass();
    if (fail_) return absl::InternalError("copying failed");
    return stream_->CopyAsync(destination, source, bytes);
  }
  absl::StatusOr<std::unique_ptr<gpu::Event>> Record() override { return stream_->Record(); }
  absl::Status Synchronize() override { return stream_->Synchronize(); }

 private:
  const std::unique_ptr<gpu::Stream> stream_;
  Gate& gate_;
  const std::atomic<bool>& fail_;
};

// Counts its bytes as long as it lives.
class CountedMemory : public gpu::DeviceMemory {
 public:
  CountedMemory(std::unique_ptr<gpu::DeviceMemory> memory,
                std::shared_ptr<std::atomic<size_t>> bytes)
      : memory_(std::move(memory)), bytes_(std::move(bytes)) {
    *bytes_ += memory_->bytes();
  }
  ~CountedMemory() override { *bytes_ -= memory_->bytes(); }

  std::byte* data() const override { return memory_->data(); }
  size_t bytes() const override { return memory_->bytes(); }
  absl::Status Clear() override { return memory_->Clear(); }
  absl::StatusOr<gpu::UniqueFd> Export() const override { return memory_->Export(); }

 private:
  const std::unique_ptr<gpu::DeviceMemory> memory_;
  const std::shared_ptr<std::atomic<size_t>> bytes_;
};

class GatedDevice : public gpu::Device, private gpu::ClusterOps, private gpu::DecodeOps {
 public:
  explicit GatedDevice(std::unique_ptr<gpu::Device> device) : device_(std::move(device)) {}

  Gate stage, cluster, shared, audit;  // whoever enqueues or asks waits
  Gate permute;                        // the stream waits
  Gate refused;                        // who got no memory waits
  std::atomic<bool> counts = true;     // who maps shared memory
  std::atomic<bool> fail_stage = false, fail_cluster = false, fail_shared = false;
  std::atomic<bool> fail_permute = false, fail_audit = false;
  std::atomic<size_t> largest_allocation = SIZE_MAX;   // not of shared memory
  std::atomic<size_t> memory_limit = SIZE_MAX;         // likewise, for all that is allocated
  std::atomic<uint32_t> fail_steps_of_generation = 0;  // by an error bit; 0: none

  // Bytes, of what memory_limit is for.
  size_t allocated() const { return *allocated_; }

  const std::string& backend() const override { return device_->backend(); }
  const std::string& description() const override { return device_->description(); }
  const std::string& uuid() const override { return device_->uuid(); }
  std::optional<int> numa_node() const override { return device_->numa_node(); }
  absl::StatusOr<std::unique_ptr<gpu::Stream>> WrapStream(void* native) override {
    return device_->WrapStream(native);
  }
  absl::StatusOr<std::unique_ptr<gpu::DeviceMemory>> AllocatePinned(size_t bytes) override {
    return device_->AllocatePinned(bytes);
  }
  absl::StatusOr<std::unique_ptr<gpu::HostRegistration>> RegisterHost(
      std::byte* data, size_t bytes, gpu::MapAccess access) override {
    return device_->RegisterHost(data, bytes, access);
  }
  bool counts_importers() const override { return counts; }
  bool computes_on_host_memory() const override { return device_->computes_on_host_memory(); }
  absl::StatusOr<std::unique_ptr<gpu::Stream>> CreateStream(const std::string& name) override {
    auto stream = device_->CreateStream(name);
    if (!stream.ok() || name != "audit") return stream;
    return std::make_unique<GatedStream>(*std::move(stream), audit, fail_audit);
  }
  absl::StatusOr<std::unique_ptr<gpu::DeviceMemory>> Allocate(size_t bytes) override {
    if (bytes > largest_allocation || *allocated_ + bytes > memory_limit) {
      refused.Pass();
      return absl::ResourceExhaustedError("no device memory");
    }
    CKV_ASSIGN_OR_RETURN(auto memory, device_->Allocate(bytes));
    return std::make_unique<CountedMemory>(std::move(memory), allocated_);
  }
  absl::StatusOr<std::unique_ptr<gpu::DeviceMemory>> AllocateShared(size_t bytes) override {
    shared.Pass();
    if (fail_shared) return absl::ResourceExhaustedError("no shared memory");
    return device_->AllocateShared(bytes);
  }
  absl::StatusOr<std::unique_ptr<gpu::DeviceMemory>> Import(gpu::UniqueFd fd,
                                                            size_t bytes) override {
    return device_->Import(std::move(fd), bytes);
  }
  gpu::DecodeOps& decode_ops() override { return *this; }
  gpu::ClusterOps& cluster_ops() override { return *this; }

 private:
  absl::Status Initialize(gpu::Stream& stream, std::byte* state, const gpu::StateLayout& layout,
                          uint32_t generation) override {
    return device_->cluster_ops().Initialize(stream, state, layout, generation);
  }
  absl::Status Stage(gpu::Stream& stream, gpu::StageArgs args) override {
    stage.Pass();
    if (fail_stage) return absl::InternalError("staging failed");
    return device_->cluster_ops().Stage(stream, std::move(args));
  }
  absl::Status Cluster(gpu::Stream& stream, gpu::ClusterArgs args) override {
    cluster.Pass();
    if (fail_cluster) return absl::InternalError("k-means failed");
    return device_->cluster_ops().Cluster(stream, std::move(args));
  }
  absl::Status Permute(gpu::Stream& stream, gpu::PermuteArgs args) override {
    auto& host_stream = dynamic_cast<gpu::host::HostStream&>(stream);
    CKV_RETURN_IF_ERROR(host_stream.Enqueue([this, fail = fail_permute.load()] {
      permute.Pass();
      return fail ? absl::InternalError("permuting failed") : absl::OkStatus();
    }));
    return device_->cluster_ops().Permute(stream, std::move(args));
  }
  absl::Status Publish(gpu::Stream& stream, gpu::PublishArgs args) override {
    return device_->cluster_ops().Publish(stream, std::move(args));
  }

  absl::Status WriteTokens(gpu::Stream& stream, const gpu::WriteTokensArgs& args) override {
    return device_->decode_ops().WriteTokens(stream, args);
  }
  absl::Status LoadBatch(gpu::Stream& stream, gpu::Batch batch) override {
    return device_->decode_ops().LoadBatch(stream, batch);
  }
  absl::Status ReportLayer(gpu::Stream& stream, gpu::Batch batch, uint32_t layer,
                           absl::Span<gpu::LayerReport> reports) override {
    absl::Status status = device_->decode_ops().ReportLayer(stream, batch, layer, reports);
    for (size_t i = 0; status.ok() && i < batch.size(); ++i) {
      if (batch[i].generation != fail_steps_of_generation) continue;
      status = stream.CopyAsync(&reports[i].errors, &kErrorBits, sizeof(kErrorBits));
    }
    return status;
  }
  absl::Status BeginStep(gpu::Stream& stream, gpu::Batch batch) override {
    return device_->decode_ops().BeginStep(stream, batch);
  }
  absl::Status Append(gpu::Stream& stream, gpu::Batch batch, uint32_t layer,
                      const gpu::KvSource& source) override {
    return device_->decode_ops().Append(stream, batch, layer, source);
  }
  absl::Status Select(gpu::Stream& stream, gpu::Batch batch, uint32_t layer,
                      const gpu::QuerySource& queries, uint32_t budget_tokens) override {
    return device_->decode_ops().Select(stream, batch, layer, queries, budget_tokens);
  }
  absl::Status Fetch(gpu::Stream& stream, gpu::Batch batch, uint32_t layer) override {
    return device_->decode_ops().Fetch(stream, batch, layer);
  }
  absl::Status Attend(gpu::Stream& stream, gpu::Batch batch, uint32_t layer,
                      const gpu::QuerySource& queries,
                      const gpu::AttentionTarget& target) override {
    return device_->decode_ops().Attend(stream, batch, layer, queries, target);
  }
  absl::Status DecodeLayer(gpu::Stream& stream, gpu::Batch batch, uint32_t layer,
                           const gpu::QuerySource& queries, uint32_t budget_tokens,
                           const gpu::AttentionTarget& target) override {
    return device_->decode_ops().DecodeLayer(stream, batch, layer, queries, budget_tokens, target);
  }
  absl::Status EndStep(gpu::Stream& stream, gpu::Batch batch,
                       absl::Span<uint32_t> errors) override {
    return device_->decode_ops().EndStep(stream, batch, errors);
  }

  static constexpr uint32_t kErrorBits = gpu::kWindowOverflow;
  const std::unique_ptr<gpu::Device> device_;
  // Shared: memory may outlive the device.
  const std::shared_ptr<std::atomic<size_t>> allocated_ = std::make_shared<std::atomic<size_t>>(0);
};

}  // namespace clusterkv::service
