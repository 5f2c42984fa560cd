#include "client/decode_tail.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "tests/client/immediate_stream.h"

namespace clusterkv::client {
namespace {

constexpr uint32_t kLayers = 3;
constexpr uint32_t kHeads = 2;

gpu::Shape TestShape() {
  return {.layers = kLayers,
          .kv_heads = kHeads,
          .q_heads = 2,
          .head_dim = 64,
          .dtype = gpu::DType::kFp32};
}

float Value(bool v, uint32_t layer, uint32_t token, uint32_t head) {
  return static_cast<float>(token * 100 + layer * 10 + head * 2 + (v ? 1 : 0));
}

class DecodeTailTest : public testing::Test {
 protected:
  DecodeTailTest()
      : ring_(64 * TestShape().token_bytes()), data_(ring_.bytes()), packer_(stream_) {}

  void AddToken(DecodeTail& tail, uint32_t token) {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      std::vector<float> k(kHeads * 64);
      std::vector<float> v(kHeads * 64);
      for (uint32_t head = 0; head < kHeads; ++head) {
        std::fill_n(k.begin() + head * 64, 64, Value(false, layer, token, head));
        std::fill_n(v.begin() + head * 64, 64, Value(true, layer, token, head));
      }
      // As gpu::DecodeOps::Append does.
      std::byte* const place = tail.token(data_.data()) + 2 * layer * tail.stride();
      std::memcpy(place, k.data(), k.size() * sizeof(float));
      std::memcpy(place + tail.stride(), v.data(), v.size() * sizeof(float));
    }
    tail.Commit();
  }

  void Expect(const DecodeTail::Range& range) {
    const RangeLayout layout(TestShape(), kLayers, range.count);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (const bool v : {false, true}) {
        const auto* block = reinterpret_cast<const float*>(
            data_.data() + range.offset + (v ? layout.v_offset(layer) : layout.k_offset(layer)));
        for (uint32_t token = 0; token < range.count; ++token) {
          for (uint32_t i = 0; i < kHeads * 64; ++i) {
            ASSERT_EQ(block[token * kHeads * 64 + i], Value(v, layer, token, i / 64));
          }
        }
      }
    }
  }

  RingAllocator ring_;
  std::vector<std::byte> data_;
  ImmediateStream stream_;
  KvPacker packer_;
};

TEST_F(DecodeTailTest, FillsARange) {
  DecodeTail tail(TestShape(), ring_);
  EXPECT_TRUE(tail.empty());
  for (uint32_t token = 0; token < 4; ++token) {
    ASSERT_TRUE(tail.Reserve(100 + token, 4).ok());
    EXPECT_FALSE(tail.full());
    AddToken(tail, token);
  }
  ASSERT_TRUE(tail.full());
  const DecodeTail::Range range = tail.Take();
  EXPECT_EQ(range.position, 100u);
  EXPECT_EQ(range.count, 4u);
  Expect(range);
  EXPECT_TRUE(tail.empty());
}

TEST_F(DecodeTailTest, CompactsAnyPartOfARangeWithoutOverlap) {
  for (uint32_t capacity = 1; capacity <= 9; ++capacity) {
    for (uint32_t count = 1; count <= capacity; ++count) {
      DecodeTail tail(TestShape(), ring_);
      for (uint32_t token = 0; token < count; ++token) {
        ASSERT_TRUE(tail.Reserve(7 + token, capacity).ok());
        AddToken(tail, token);
      }
      ASSERT_TRUE(tail.Compact(packer_, data_.data()).ok());
      const DecodeTail::Range range = tail.Take();
      ASSERT_EQ(range.count, count);
      Expect(range);
      // What the range no longer needs is free again.
      EXPECT_EQ(ring_.free_bytes(), ring_.bytes() - count * TestShape().token_bytes());
      ring_.Release(range.offset);
    }
  }
  EXPECT_FALSE(stream_.overlapped);
}

TEST_F(DecodeTailTest, TakesASmallerRangeWhereTheRingIsShort) {
  const auto held =
      ring_.Allocate(ring_.bytes() - 3 * TestShape().token_bytes(), Deadline(absl::ZeroDuration()));
  ASSERT_TRUE(held.ok());
  DecodeTail tail(TestShape(), ring_);
  ASSERT_TRUE(tail.Reserve(0, 32).ok());
  AddToken(tail, 0);
  EXPECT_FALSE(tail.full());
  AddToken(tail, 1);
  EXPECT_TRUE(tail.full());
}

TEST_F(DecodeTailTest, IsExhaustedWithoutRoomForOneToken) {
  ASSERT_TRUE(ring_.Allocate(ring_.bytes(), Deadline(absl::ZeroDuration())).ok());
  DecodeTail tail(TestShape(), ring_);
  EXPECT_TRUE(absl::IsResourceExhausted(tail.Reserve(0, 32)));
  EXPECT_TRUE(tail.empty());
}

TEST_F(DecodeTailTest, GivesItsRangeBackWhenDestroyed) {
  {
    DecodeTail tail(TestShape(), ring_);
    ASSERT_TRUE(tail.Reserve(0, 8).ok());
    EXPECT_LT(ring_.free_bytes(), ring_.bytes());
  }
  EXPECT_EQ(ring_.free_bytes(), ring_.bytes());
}

}  // namespace
}  // namespace clusterkv::client
