#include "client/replay/trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <limits>

#include "nlohmann/json.hpp"
#include "tests/client/replay/random_trace.h"

namespace clusterkv::client::replay {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

// A safetensors file taken apart.
struct Parts {
  json header;
  std::string data;

  static Parts Of(const std::string& file) {
    uint64_t length = 0;
    std::memcpy(&length, file.data(), 8);
    return {json::parse(file.substr(8, length)), file.substr(8 + length)};
  }
  std::string Join() const { return JoinText(header.dump()); }
  std::string JoinText(const std::string& text) const {
    std::string length(8, '\0');
    const uint64_t bytes = text.size();
    std::memcpy(length.data(), &bytes, 8);
    return length + text + data;
  }
};

class TraceTest : public testing::Test {
 protected:
  void SetUp() override {
    path_ = directory_.Path("trace.safetensors");
    WriteRandomTrace(path_, {.prompt_tokens = 20, .steps = 4});
    parts_ = Parts::Of(ReadFile(path_));
  }
  absl::Status OpenParts() { return OpenFile(parts_.Join()); }
  absl::Status OpenFile(const std::string& content) {
    WriteFile(path_, content);
    return Trace::Open(path_).status();
  }

  TemporaryDirectory directory_;
  std::string path_;
  Parts parts_;
};

TEST_F(TraceTest, ReadsWhatWasWritten) {
  const absl::StatusOr<Trace> trace = Trace::Open(path_);
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->shape(), (gpu::Shape{2, 2, 4, 64, gpu::DType::kFp32}));
  EXPECT_EQ(trace->prompt_tokens(), 20u);
  EXPECT_EQ(trace->steps(), 4u);
  EXPECT_EQ(trace->tokens(), 24u);
  EXPECT_EQ(trace->softmax_scale(), 0.125f);
  ASSERT_EQ(trace->layers().size(), 2u);
  EXPECT_EQ(trace->layers()[0].index, 3u);
  EXPECT_EQ(trace->layers()[1].index, 7u);
  const auto offsets = parts_.header["layers.7.q"]["data_offsets"];
  EXPECT_EQ(std::memcmp(trace->layers()[1].q, parts_.data.data() + offsets[0].get<size_t>(),
                        4 * 4 * 64 * 4),
            0);
}

TEST_F(TraceTest, SortsLayers) {
  parts_.header["__metadata__"]["layers"] = "7,3";
  WriteFile(path_, parts_.Join());
  const absl::StatusOr<Trace> trace = Trace::Open(path_);
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->layers()[0].index, 3u);
}

TEST_F(TraceTest, ReadsDataOfAnyAlignment) {
  std::string text = parts_.header.dump();
  text.append(1 + text.size() % 2, ' ');  // an odd length
  EXPECT_TRUE(OpenFile(parts_.JoinText(text)).ok());
}

TEST_F(TraceTest, RefusesMissingFile) {
  EXPECT_EQ(Trace::Open(directory_.Path("nothing")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(Trace::Open(directory_.Path("")).ok());
}

struct Malformation {
  const char* name;
  std::function<void(Parts&)> change;
  const char* message;  // part of it
};

void Meta(Parts& parts, const char* key, json value) { parts.header["__metadata__"][key] = value; }

const Malformation kMalformations[] = {
    {"NoMetadata", [](Parts& p) { p.header.erase("__metadata__"); }, "no \"format\""},
    {"MetadataNumber", [](Parts& p) { Meta(p, "prompt_tokens", 20); }, "is not a string"},
    {"MetadataList", [](Parts& p) { p.header["__metadata__"] = json::array(); }, "not an object"},
    {"OtherFormat", [](Parts& p) { Meta(p, "format", "clusterkv-trace/2"); }, "format is"},
    {"NoModel", [](Parts& p) { p.header["__metadata__"].erase("model"); }, "no \"model\""},
    {"PromptNegative", [](Parts& p) { Meta(p, "prompt_tokens", "-1"); }, "prompt_tokens"},
    {"PromptZero", [](Parts& p) { Meta(p, "prompt_tokens", "0"); }, "prompt_tokens"},
    {"PromptOther", [](Parts& p) { Meta(p, "prompt_tokens", "21"); }, "expected [25"},
    {"StepsOther", [](Parts& p) { Meta(p, "decode_tokens", "5"); }, "expected [25"},
    {"StepsHuge", [](Parts& p) { Meta(p, "decode_tokens", "16777216"); }, "up to 16777216"},
    {"ScaleZero", [](Parts& p) { Meta(p, "softmax_scale", "0"); }, "softmax_scale"},
    {"ScaleNan", [](Parts& p) { Meta(p, "softmax_scale", "nan"); }, "softmax_scale"},
    {"ScaleText", [](Parts& p) { Meta(p, "softmax_scale", "x"); }, "softmax_scale"},
    {"LayersEmpty", [](Parts& p) { Meta(p, "layers", ""); }, "layers is"},
    {"LayersSpace", [](Parts& p) { Meta(p, "layers", "3, 7"); }, "layers is"},
    {"LayersTwice", [](Parts& p) { Meta(p, "layers", "3,3"); }, "there twice"},
    {"LayerMissing", [](Parts& p) { Meta(p, "layers", "3,7,8"); }, "no tensor layers.8.k"},
    {"DtypeInt", [](Parts& p) { p.header["layers.3.k"]["dtype"] = "I32"; }, "is I32; allowed"},
    {"DtypeUnknown", [](Parts& p) { p.header["layers.3.k"]["dtype"] = "F17"; }, "unknown dtype"},
    {"DtypeNumber", [](Parts& p) { p.header["layers.3.k"]["dtype"] = 3; }, "dtype is not"},
    {"DtypesDiffer",
     [](Parts& p) {
       p.header["layers.7.v"]["dtype"] = "F16";
       p.header["layers.7.v"]["shape"] = {24, 2, 128};
     },
     "layers.7.v is F16; the tensors before it are fp32"},
    {"ShapeFlat", [](Parts& p) { p.header["layers.3.k"]["shape"] = {24 * 2 * 64}; },
     "expected [24"},
    {"ShapeNegative",
     [](Parts& p) {
       p.header["layers.3.k"]["shape"] = {-24, 2, 64};
     },
     "shape"},
    {"ShapeOverflow",
     [](Parts& p) {
       p.header["layers.3.k"]["shape"] = {1ull << 62, 1ull << 62, 64};
     },
     "2^64"},
    {"ShapeOther",
     [](Parts& p) {
       p.header["layers.3.k"]["shape"] = {24, 2, 63};
     },
     "bytes"},
    {"HeadDim",
     [](Parts& p) {
       p.header["layers.3.k"]["shape"] = {24, 4, 32};
     },
     "head_dim"},
    {"ValueHeads",
     [](Parts& p) {
       p.header["layers.3.v"]["shape"] = {24, 1, 128};
     },
     "layers.3.v"},
    {"QueryHeads",
     [](Parts& p) {
       p.header["layers.7.q"]["shape"] = {4, 1, 256};
     },
     "layers.7.q"},
    {"OffsetsBeyond", [](Parts& p) { p.data.resize(p.data.size() - 4); }, "do not lie within"},
    {"OffsetsFalling",
     [](Parts& p) {
       p.header["layers.3.k"]["data_offsets"] = {100, 50};
     },
     "do not lie within"},
    {"OffsetsOne", [](Parts& p) { p.header["layers.3.k"]["data_offsets"] = {0}; }, "pair"},
    {"Trailing", [](Parts& p) { p.data += "more"; }, "the tensors end at"},
    {"Overlap",
     [](Parts& p) {
       p.header["layers.3.v"]["data_offsets"] = {0, 24 * 2 * 64 * 4};
     },
     "overlap"},
    {"Gap", [](Parts& p) { p.header.erase("layers.3.k"); }, "gap"},
    {"TensorNoObject", [](Parts& p) { p.header["layers.3.k"] = 3; }, "not an object"},
    {"TokenIds",
     [](Parts& p) {
       p.header["token_ids"] = {
           {"dtype", "I32"}, {"shape", {1}}, {"data_offsets", {p.data.size(), p.data.size() + 4}}};
       p.data += "1234";
     },
     "token_ids"},
    {"Nan",
     [](Parts& p) {
       const float nan = std::numeric_limits<float>::quiet_NaN();
       const size_t begin = p.header["layers.7.v"]["data_offsets"][0].get<size_t>();
       std::memcpy(p.data.data() + begin + 40, &nan, 4);
     },
     "layers.7.v: element 10"},
    {"Infinity",
     [](Parts& p) {
       const float infinity = -std::numeric_limits<float>::infinity();
       std::memcpy(p.data.data() + p.header["layers.3.q"]["data_offsets"][0].get<size_t>(),
                   &infinity, 4);
     },
     "layers.3.q: element 0"},
};

TEST_F(TraceTest, RefusesEveryMalformation) {
  const Parts sound = parts_;
  for (const Malformation& malformation : kMalformations) {
    SCOPED_TRACE(malformation.name);
    parts_ = sound;
    malformation.change(parts_);
    const absl::Status status = OpenParts();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(malformation.message));
    EXPECT_THAT(std::string(status.message()), HasSubstr(path_));
  }
}

TEST_F(TraceTest, RefusesBrokenContainers) {
  const std::string sound = ReadFile(path_);
  std::string twice = parts_.header.dump();
  twice.insert(1, "\"layers.3.k\":" + parts_.header["layers.3.k"].dump() + ",");
  const std::pair<std::string, const char*> files[] = {
      {"", "empty"},
      {"1234567", "too short"},
      {sound.substr(0, 100), "header length"},
      {std::string(8, '\xff') + sound.substr(8), "header length"},
      {parts_.JoinText("{\"a\":"), "not JSON"},
      {parts_.JoinText("[]"), "not a JSON object"},
      {parts_.JoinText(twice), "twice"},
  };
  for (const auto& [content, message] : files) {
    const absl::Status status = OpenFile(content);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
}

TEST_F(TraceTest, FindsInfinityInHalfPrecision) {
  for (const gpu::DType dtype : {gpu::DType::kFp16, gpu::DType::kBf16}) {
    WriteRandomTrace(path_, {.prompt_tokens = 20, .steps = 4, .dtype = dtype});
    ASSERT_TRUE(Trace::Open(path_).ok());
    parts_ = Parts::Of(ReadFile(path_));
    const uint16_t infinity = dtype == gpu::DType::kFp16 ? 0xfc00 : 0xff80;
    std::memcpy(parts_.data.data(), &infinity, 2);
    EXPECT_THAT(std::string(OpenParts().message()), HasSubstr("layers.3.k: element 0"));
  }
}

}  // namespace
}  // namespace clusterkv::client::replay
