// A sequence with all its K and V at hand: random data in storage precision, and attention over all
// of it in double. Shares nothing with the service.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "gpu/shape.h"

namespace clusterkv::testing {

class DenseSequence {
 public:
  explicit DenseSequence(const gpu::Shape& shape) : shape_(shape) {}

  // Random tokens: a slowly drifting topic, as keys of text have, and noise.
  void AddTokens(uint32_t count, std::mt19937_64& random);
  // [q_heads][head_dim] in storage type.
  std::vector<std::byte> RandomQuery(std::mt19937_64& random) const;

  uint32_t length() const { return length_; }
  // Rows [layer][token][kv_head][head_dim] of the tokens added since `position`, as the client
  // takes them: contiguous per layer.
  std::vector<std::byte> Keys(uint32_t layer_begin, uint32_t layer_count, uint32_t position,
                              uint32_t count) const;
  std::vector<std::byte> Values(uint32_t layer_begin, uint32_t layer_count, uint32_t position,
                                uint32_t count) const;
  // Attention over all tokens: [q_heads][head_dim].
  std::vector<double> Attention(uint32_t layer, const std::vector<std::byte>& query) const;

 private:
  std::vector<std::byte> Gather(const std::vector<std::vector<std::byte>>& rows,
                                uint32_t layer_begin, uint32_t layer_count, uint32_t position,
                                uint32_t count) const;
  double Element(const std::byte* row, size_t i) const;

  const gpu::Shape shape_;
  uint32_t length_ = 0;
  std::vector<std::vector<std::byte>> keys_, values_;  // [layer]: [token][kv_head][head_dim]
  std::vector<double> topic_;
};

// Relative L2 distance per head, the largest.
double WorstRelativeError(const std::vector<double>& expected, const float* actual,
                          size_t head_dim);

}  // namespace clusterkv::testing
