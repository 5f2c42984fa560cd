#include "tests/integration/dense_sequence.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gpu/host/simd.h"

namespace clusterkv::testing {
namespace {

std::vector<std::byte> ToStorage(gpu::DType dtype, const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * gpu::SizeOf(dtype));
  gpu::host::FromFloat(dtype, values.data(), bytes.data(), values.size());
  return bytes;
}

}  // namespace

void DenseSequence::AddTokens(uint32_t count, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  const size_t row = size_t{shape_.kv_heads} * shape_.head_dim;
  keys_.resize(shape_.layers);
  values_.resize(shape_.layers);
  topic_.resize(row);
  for (uint32_t token = 0; token < count; ++token) {
    for (double& x : topic_) x = 0.95 * x + 0.3 * normal(random);
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
      std::vector<float> k(row), v(row);
      for (size_t i = 0; i < row; ++i) {
        k[i] = static_cast<float>(topic_[i] + 0.5 * normal(random));
        v[i] = static_cast<float>(normal(random));
      }
      const auto k_bytes = ToStorage(shape_.dtype, k), v_bytes = ToStorage(shape_.dtype, v);
      keys_[layer].insert(keys_[layer].end(), k_bytes.begin(), k_bytes.end());
      values_[layer].insert(values_[layer].end(), v_bytes.begin(), v_bytes.end());
    }
  }
  length_ += count;
}

std::vector<std::byte> DenseSequence::RandomQuery(std::mt19937_64& random) const {
  std::normal_distribution<double> normal;
  std::vector<float> q(size_t{shape_.q_heads} * shape_.head_dim);
  for (float& x : q) x = static_cast<float>(normal(random));
  return ToStorage(shape_.dtype, q);
}

std::vector<std::byte> DenseSequence::Gather(const std::vector<std::vector<std::byte>>& rows,
                                             uint32_t layer_begin, uint32_t layer_count,
                                             uint32_t position, uint32_t count) const {
  const size_t token = size_t{shape_.kv_heads} * shape_.head_dim * gpu::SizeOf(shape_.dtype);
  std::vector<std::byte> gathered;
  for (uint32_t layer = layer_begin; layer < layer_begin + layer_count; ++layer) {
    const std::byte* begin = rows[layer].data() + position * token;
    gathered.insert(gathered.end(), begin, begin + count * token);
  }
  return gathered;
}

std::vector<std::byte> DenseSequence::Keys(uint32_t layer_begin, uint32_t layer_count,
                                           uint32_t position, uint32_t count) const {
  return Gather(keys_, layer_begin, layer_count, position, count);
}

std::vector<std::byte> DenseSequence::Values(uint32_t layer_begin, uint32_t layer_count,
                                             uint32_t position, uint32_t count) const {
  return Gather(values_, layer_begin, layer_count, position, count);
}

double DenseSequence::Element(const std::byte* row, size_t i) const {
  float value = 0;
  gpu::host::ToFloat(shape_.dtype, row + i * gpu::SizeOf(shape_.dtype), &value, 1);
  return value;
}

std::vector<double> DenseSequence::Attention(uint32_t layer,
                                             const std::vector<std::byte>& query) const {
  const size_t dim = shape_.head_dim;
  const size_t bytes = dim * gpu::SizeOf(shape_.dtype);
  std::vector<double> out(shape_.q_heads * dim);
  std::vector<float> wide(dim);
  for (uint32_t head = 0; head < shape_.q_heads; ++head) {
    std::vector<double> q(dim);
    for (size_t i = 0; i < dim; ++i) q[i] = Element(query.data() + head * bytes, i);
    const size_t kv_head = head / shape_.group_size();
    const auto row = [&](const std::vector<std::vector<std::byte>>& rows, uint32_t token) {
      gpu::host::ToFloat(shape_.dtype,
                         rows[layer].data() + (size_t{token} * shape_.kv_heads + kv_head) * bytes,
                         wide.data(), dim);
      return wide.data();
    };
    std::vector<double> scores(length_);
    for (uint32_t token = 0; token < length_; ++token) {
      const float* k = row(keys_, token);
      for (size_t i = 0; i < dim; ++i) scores[token] += q[i] * k[i];
      scores[token] /= std::sqrt(static_cast<double>(dim));
    }
    const double top = *std::ranges::max_element(scores);
    double sum = 0;
    for (uint32_t token = 0; token < length_; ++token) {
      const double weight = std::exp(scores[token] - top);
      sum += weight;
      const float* v = row(values_, token);
      for (size_t i = 0; i < dim; ++i) out[head * dim + i] += weight * v[i];
    }
    for (size_t i = 0; i < dim; ++i) out[head * dim + i] /= sum;
  }
  return out;
}

double WorstRelativeError(const std::vector<double>& expected, const float* actual,
                          size_t head_dim) {
  double worst = 0;
  for (size_t head = 0; head < expected.size() / head_dim; ++head) {
    double difference = 0, norm = 0;
    for (size_t i = head * head_dim; i < (head + 1) * head_dim; ++i) {
      difference += (expected[i] - actual[i]) * (expected[i] - actual[i]);
      norm += expected[i] * expected[i];
    }
    const double relative = std::sqrt(difference / norm);
    worst = relative >= worst ? relative : (std::isnan(relative) ? INFINITY : worst);
  }
  return worst;
}

}  // namespace clusterkv::testing
