// A sequence with random K and V, clustered at random by the test itself and published through
// Stage, Permute and Publish; beside it a model in double that knows what must be where.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "gpu/cluster_ops.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/segment_plan.h"
#include "gpu/state_layout.h"

namespace clusterkv::gpu {

struct Scenario {
  Shape shape;
  MethodOptions method;
  uint32_t max_tokens = 1000;
  uint64_t seed = 0;
};

// One element of storage, by definition of the format.
double StoredValue(DType dtype, const std::byte* bytes);
void StoreValue(DType dtype, double value, std::byte* bytes);

// Device memory that a test fills and reads through a stream.
class TestBuffer {
 public:
  TestBuffer(Device& device, Stream& stream, size_t bytes);

  std::byte* data() const { return memory_->data(); }
  void Upload(const void* source, size_t bytes);
  template <typename T>
  std::vector<T> Download(size_t offset, size_t count) const {
    std::vector<T> values(count);
    DownloadBytes(values.data(), offset, count * sizeof(T));
    return values;
  }

 private:
  void DownloadBytes(void* destination, size_t offset, size_t bytes) const;

  Stream& stream_;
  std::unique_ptr<DeviceMemory> memory_;
};

// For BatchSlot::host_chunks: null everywhere.
std::unique_ptr<DeviceMemory> PinnedChunkTable(Device& device, size_t chunks);

struct ModelCluster {
  std::vector<uint32_t> positions;  // ascending
  std::vector<double> centroid, value_mean;
};

class TestSequence {
 public:
  TestSequence(Device& device, Stream& stream, const Scenario& scenario, uint32_t generation);

  const Shape& shape() const { return scenario_.shape; }
  const MethodOptions& method() const { return scenario_.method; }
  const StateLayout& layout() const { return layout_; }
  BatchSlot slot() const;
  TestBuffer& state() { return *state_; }
  // [layer][K, V][token][kv_head][head_dim] of all max_tokens.
  std::byte* tokens() const { return tokens_->data(); }
  size_t token_offset(uint32_t layer, bool v, uint32_t position, uint32_t kv_head) const;
  const std::byte* token_bytes(uint32_t layer, bool v, uint32_t position, uint32_t kv_head) const {
    return &host_tokens_[token_offset(layer, v, position, kv_head)];
  }
  // K or V row of a token in double.
  std::vector<double> Row(uint32_t layer, bool v, uint32_t position, uint32_t kv_head) const;

  // Writes [position, position + count) into sinks and window and sets the length.
  WriteTokensArgs WriteArgs(uint32_t position, uint32_t count) const;
  void IngestPrompt(uint32_t tokens);
  // Publishes all that the plan allows at this length.
  void PublishComplete();
  void Publish(const Segment& segment);

  uint32_t length = 0;
  uint32_t prompt = 0;
  uint32_t cut() const { return plan_.cut(); }
  uint32_t segments() const { return static_cast<uint32_t>(chunks_.size()); }
  const std::vector<ModelCluster>& clusters(uint32_t layer, uint32_t kv_head) const {
    return clusters_[layout_.head_index(layer, kv_head)];
  }

 private:
  struct HeadRun;  // the buffers that publishing one head's segment needs

  HeadRun ClusterAtRandom(uint32_t layer, uint32_t kv_head, const Segment& segment);

  Device& device_;
  Stream& stream_;
  Scenario scenario_;
  uint32_t generation_;
  std::mt19937_64 random_;
  StateLayout layout_;
  SegmentPlan plan_;
  std::unique_ptr<TestBuffer> state_, tokens_;
  std::vector<std::byte> host_tokens_;
  std::vector<std::unique_ptr<TestBuffer>> chunks_;  // one of each segment
  std::unique_ptr<DeviceMemory> chunk_addresses_;    // pinned
  std::vector<std::vector<ModelCluster>> clusters_;  // [head_index]
};

}  // namespace clusterkv::gpu
