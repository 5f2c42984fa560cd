#include "gpu/dtype.h"

#include <gtest/gtest.h>

#include "gpu/shape.h"

namespace clusterkv::gpu {
namespace {

Shape LlamaShape() {
  return {.layers = 32, .kv_heads = 8, .q_heads = 32, .head_dim = 128, .dtype = DType::kBf16};
}

TEST(DType, NamesParseBackToThemselves) {
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    const auto parsed = ParseDType(DTypeName(dtype));
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(*parsed, dtype);
  }
}

TEST(DType, UnknownNameListsWhatIsAllowed) {
  for (const char* name : {"", "BF16", "float", "fp8"}) {
    const absl::Status status = ParseDType(name).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_NE(status.ToString().find("bf16, fp16, fp32"), std::string::npos) << status;
  }
}

TEST(Shape, CountsBytesOfRowsAndTokens) {
  const Shape shape = LlamaShape();
  EXPECT_TRUE(shape.Validate().ok());
  EXPECT_EQ(shape.group_size(), 4u);
  EXPECT_EQ(shape.row_bytes(), 512u);
  EXPECT_EQ(shape.token_bytes(), 131'072u);
}

TEST(Shape, RefusesEachFieldOutsideItsRange) {
  const auto expect_refused = [](const Shape& shape, const char* field) {
    const absl::Status status = shape.Validate();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_NE(status.ToString().find(field), std::string::npos) << status;
  };
  for (uint32_t layers : {0u, 1025u, ~0u}) {
    Shape shape = LlamaShape();
    shape.layers = layers;
    expect_refused(shape, "layers");
  }
  for (uint32_t kv_heads : {0u, 1025u, ~0u}) {
    Shape shape = LlamaShape();
    shape.kv_heads = kv_heads;
    expect_refused(shape, "kv_heads");
  }
  for (uint32_t q_heads : {0u, 7u, 9u, 8u * 17u, ~0u}) {
    Shape shape = LlamaShape();
    shape.q_heads = q_heads;
    expect_refused(shape, "q_heads");
  }
  for (uint32_t head_dim : {0u, 32u, 80u, 512u}) {
    Shape shape = LlamaShape();
    shape.head_dim = head_dim;
    expect_refused(shape, "head_dim");
  }
  Shape shape = LlamaShape();
  shape.dtype = static_cast<DType>(4);
  expect_refused(shape, "dtype");
}

}  // namespace
}  // namespace clusterkv::gpu
