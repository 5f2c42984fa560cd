// Decode steps of a batch on a device, each operation compared with its definition in double.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "tests/gpu/test_sequence.h"

namespace clusterkv::gpu {

class DecodeChecker {
 public:
  DecodeChecker(Device& device, Stream& stream, std::vector<TestSequence*> sequences,
                uint64_t seed);

  // One whole step, all layers; every other layer and step by DecodeLayer. Failures are reported by
  // GoogleTest.
  void Step(uint32_t budget_tokens);

  // As the model counts them, over all steps and sequences.
  uint64_t hits = 0, misses = 0, evictions = 0;
  std::vector<uint32_t> errors;  // of the last step

 private:
  // What a step's latch says, and the cache of each head, by the model.
  struct Model {
    uint32_t cut = 0;
    uint32_t step = 0;
    std::vector<std::map<uint32_t, uint32_t>> last_used;  // [head_index]: resident cluster -> step
    std::vector<std::vector<double>> mean_scores;         // [head_index][cluster]
    std::vector<LayerCounters> counters;                  // [layer]
  };
  struct Selection {
    std::vector<uint32_t> cluster, take;
  };

  void UploadStep(uint32_t layer);
  // [group][head_dim]
  std::vector<std::vector<double>> GroupQueries(size_t i, uint32_t kv_head) const;
  Selection CheckSelection(size_t i, uint32_t layer, uint32_t kv_head, uint32_t budget,
                           const std::vector<double>& scores);
  void CheckMeans(size_t i, uint32_t layer, uint32_t kv_head, const std::vector<double>& scores);
  // Touches what was selected, takes the step's victims from the state, and checks that they were
  // the least worth and no more than needed.
  void CheckResidence(size_t i, uint32_t layer, uint32_t kv_head, const Selection& selection);
  // slot_table: an operation has left one.
  void CheckCache(size_t i, uint32_t layer, uint32_t kv_head, const Selection& selection,
                  bool slot_table);
  void CheckOutput(size_t i, uint32_t layer, uint32_t kv_head, const Selection& selection);
  std::vector<double> Scores(size_t i, uint32_t layer, uint32_t kv_head) const;

  const Shape& shape() const { return sequences_[0]->shape(); }

  Device& device_;
  Stream& stream_;
  std::vector<TestSequence*> sequences_;
  std::mt19937_64 random_;
  std::vector<Model> models_;
  uint32_t steps_ = 0;
  std::vector<BatchSlot> batch_;
  std::vector<std::byte> host_queries_;
  std::vector<double> base_queries_;  // what steps vary, so that selections repeat in part
  std::unique_ptr<TestBuffer> queries_, appended_, out_, lse_;
  std::unique_ptr<DeviceMemory> reports_;  // pinned [sequences]
  QuerySource query_source_;
  AttentionTarget target_;
};

}  // namespace clusterkv::gpu
