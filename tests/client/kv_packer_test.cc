#include "client/kv_packer.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/client/immediate_stream.h"

namespace clusterkv::client {
namespace {

constexpr uint32_t kTokens = 5;
constexpr uint32_t kHeads = 3;
constexpr size_t kRow = 16;

// The row of (token, head) holds token * 16 + head in every byte.
std::byte Value(uint32_t token, uint32_t head) { return static_cast<std::byte>(token * 16 + head); }

// Packs from a source with these strides and checks the whole result.
size_t CopiesToPack(size_t token_stride, size_t head_stride) {
  std::vector<std::byte> source(kTokens * token_stride + kHeads * head_stride + kRow);
  for (uint32_t token = 0; token < kTokens; ++token) {
    for (uint32_t head = 0; head < kHeads; ++head) {
      std::fill_n(
          source.begin() + static_cast<ptrdiff_t>(token * token_stride + head * head_stride), kRow,
          Value(token, head));
    }
  }
  std::vector<std::byte> packed(kTokens * kHeads * kRow);
  ImmediateStream stream;
  KvPacker packer(stream);
  EXPECT_TRUE(packer
                  .Pack(packed.data(), {.data = source.data(),
                                        .token_stride = token_stride,
                                        .head_stride = head_stride,
                                        .tokens = kTokens,
                                        .heads = kHeads,
                                        .row_bytes = kRow})
                  .ok());
  for (uint32_t token = 0; token < kTokens; ++token) {
    for (uint32_t head = 0; head < kHeads; ++head) {
      for (size_t b = 0; b < kRow; ++b) {
        EXPECT_EQ(packed[(token * kHeads + head) * kRow + b], Value(token, head));
      }
    }
  }
  return stream.copies;
}

TEST(KvPacker, CopiesAContiguousSourceAtOnce) { EXPECT_EQ(CopiesToPack(kHeads * kRow, kRow), 1u); }

TEST(KvPacker, CopiesTokenByTokenWhereHeadsAdjoin) {
  EXPECT_EQ(CopiesToPack(kHeads * kRow + 32, kRow), kTokens);
}

TEST(KvPacker, CopiesRowByRowWhereHeadsAreApart) {
  EXPECT_EQ(CopiesToPack(kRow, kTokens * kRow), kTokens * kHeads);  // [head][token]
}

TEST(KvPacker, WaitsForTheStreamBeforeItsQueueIsFull) {
  ImmediateStream stream;
  KvPacker packer(stream);
  char from = 1;
  char to = 0;
  for (int i = 0; i < 20'000; ++i) ASSERT_TRUE(packer.Copy(&to, &from, 1).ok());
  EXPECT_EQ(stream.synchronized, 2u);
}

TEST(KvPacker, ReportsTheStreamsError) {
  ImmediateStream stream;
  stream.failure = absl::InternalError("dead");
  KvPacker packer(stream);
  char from = 1;
  char to = 0;
  EXPECT_EQ(packer.Copy(&to, &from, 1), absl::InternalError("dead"));
}

}  // namespace
}  // namespace clusterkv::client
