// Random K, V and queries with the structure that clustering lives on: a head's keys share an
// offset with a few strong channels, tokens come in runs of one topic, and a query asks for a few
// topics more or less. A function of the seed alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gpu/shape.h"

namespace clusterkv::client::bench {

class KeyModel {
 public:
  // `shape.layers` does not matter: every layer has the same keys.
  KeyModel(const gpu::Shape& shape, uint32_t tokens, uint64_t seed);

  // Rows (K then V) of tokens [begin, begin + count) of one KV head, storage dtype.
  void WriteRows(uint32_t kv_head, uint32_t begin, uint32_t count, std::byte* rows) const;
  // [q_heads][head_dim] of one sequence and layer.
  void WriteQueries(uint32_t sequence, uint32_t layer, std::byte* queries) const;

 private:
  const float* topic(uint32_t kv_head, uint32_t index) const {
    return topics_.data() + (size_t{kv_head} * topic_count_ + index) * shape_.head_dim;
  }

  const gpu::Shape shape_;
  const uint64_t seed_;
  uint32_t topic_count_;
  std::vector<uint16_t> topic_of_token_;
  std::vector<float> offsets_;  // [kv_heads][head_dim]
  std::vector<float> topics_;   // [kv_heads][topics][head_dim]
};

}  // namespace clusterkv::client::bench
