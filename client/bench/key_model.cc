#include "client/bench/key_model.h"

#include <algorithm>
#include <cmath>

#include "gpu/host/simd.h"

namespace clusterkv::client::bench {
namespace {

constexpr uint32_t kTokensPerTopic = 128;  // on average, over the whole context
constexpr uint32_t kMeanRun = 32;          // tokens until the topic changes
constexpr uint32_t kMaxTopics = 65'535;
constexpr float kNoise = 0.7f;
constexpr uint32_t kTopicsAskedFor = 16;

// Fast, and good enough for noise: xorshift64* with SplitMix64's finaliser on the seed.
class Random {
 public:
  Random(uint64_t seed, uint64_t stream) : state_(Mix(seed * 0x9e3779b97f4a7c15ull + stream) | 1) {}

  uint64_t Next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dull;
  }
  uint32_t Below(uint32_t bound) { return static_cast<uint32_t>((Next() >> 32) * bound >> 32); }
  // Nearly normal: the sum of four bytes. Two a draw.
  void Normals(float* values, size_t count) {
    for (size_t i = 0; i < count; i += 2) {
      const uint64_t bits = Next();
      values[i] = FromBytes(static_cast<uint32_t>(bits));
      values[i + 1] = FromBytes(static_cast<uint32_t>(bits >> 32));
    }
  }

 private:
  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  }
  static float FromBytes(uint32_t bits) {
    const uint32_t sum = (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24);
    constexpr float kDeviation = 147.8f;  // of the sum of four uniform bytes
    return (static_cast<float>(sum) - 510.0f) / kDeviation;
  }

  uint64_t state_;
};

enum Stream : uint64_t {
  kOffsets = 1,
  kTopics = 2,
  kOrder = 3,
  kRows = 1u << 20,
  kQueries = 2u << 20
};

}  // namespace

KeyModel::KeyModel(const gpu::Shape& shape, uint32_t tokens, uint64_t seed)
    : shape_(shape),
      seed_(seed),
      topic_count_(std::clamp(tokens / kTokensPerTopic, kTopicsAskedFor, kMaxTopics)),
      topic_of_token_(tokens),
      offsets_(size_t{shape.kv_heads} * shape.head_dim),
      topics_(size_t{shape.kv_heads} * topic_count_ * shape.head_dim) {
  Random offsets(seed, kOffsets);
  offsets.Normals(offsets_.data(), offsets_.size());
  for (float& value : offsets_) value *= offsets.Below(32) == 0 ? 8.0f : 0.5f;
  Random topics(seed, kTopics);
  topics.Normals(topics_.data(), topics_.size());
  Random order(seed, kOrder);
  uint32_t current = 0;
  for (uint16_t& topic : topic_of_token_) {
    if (order.Below(kMeanRun) == 0) current = order.Below(topic_count_);
    topic = static_cast<uint16_t>(current);
  }
}

void KeyModel::WriteRows(uint32_t kv_head, uint32_t begin, uint32_t count, std::byte* rows) const {
  const size_t dim = shape_.head_dim;
  Random random(seed_, kRows + (uint64_t{kv_head} << 32) + begin);
  std::vector<float> row(2 * dim);
  const float* const offset = offsets_.data() + kv_head * dim;
  for (uint32_t t = 0; t < count; ++t, rows += shape_.row_bytes()) {
    random.Normals(row.data(), row.size());
    const float* const center = topic(kv_head, topic_of_token_[begin + t]);
    for (size_t i = 0; i < dim; ++i) row[i] = offset[i] + center[i] + kNoise * row[i];
    gpu::host::FromFloat(shape_.dtype, row.data(), rows, row.size());
  }
}

void KeyModel::WriteQueries(uint32_t sequence, uint32_t layer, std::byte* queries) const {
  const size_t dim = shape_.head_dim;
  Random random(seed_, kQueries + (uint64_t{sequence} << 32) + layer);
  std::vector<float> query(dim), wanted(dim);
  for (uint32_t kv_head = 0; kv_head < shape_.kv_heads; ++kv_head) {
    std::fill(wanted.begin(), wanted.end(), 0.0f);
    float weight = 0.6f;
    for (uint32_t i = 0; i < kTopicsAskedFor; ++i, weight *= 0.85f) {
      const float* const center = topic(kv_head, random.Below(topic_count_));
      for (size_t d = 0; d < dim; ++d) wanted[d] += weight * center[d];
    }
    for (uint32_t g = 0; g < shape_.group_size(); ++g) {
      random.Normals(query.data(), dim);
      for (size_t d = 0; d < dim; ++d) query[d] = wanted[d] + 0.3f * query[d];
      gpu::host::FromFloat(shape_.dtype, query.data(), queries, dim);
      queries += dim * gpu::SizeOf(shape_.dtype);
    }
  }
}

}  // namespace clusterkv::client::bench
