#include "client/replay/dump.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "client/replay/safetensors.h"
#include "tests/client/replay/random_trace.h"

namespace clusterkv::client::replay {
namespace {

using ::testing::ElementsAre;

TEST(OutputDump, WritesTheContractsTensors) {
  const TemporaryDirectory directory;
  const Trace trace = MakeRandomTrace(directory, {.prompt_tokens = 10, .steps = 3});
  OutputDump dump(trace, /*steps=*/2, /*budget=*/5);
  std::vector<float> outputs(4 * 64);
  std::vector<int32_t> selected(2 * 5, -1);
  for (size_t i = 0; i < outputs.size(); ++i) outputs[i] = static_cast<float>(i);
  selected[5] = 7;
  dump.Set(/*layer=*/1, /*step=*/1, outputs, selected);
  const std::string path = directory.Path("dump.safetensors");
  ASSERT_TRUE(dump.Write(path).ok());

  std::ifstream in(path, std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(in), {}};
  const auto parsed = ParseSafetensors(
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(file.data()), file.size()));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  ASSERT_EQ(parsed->tensors.size(), 4u);
  const Tensor& o = parsed->tensors.at("layers.7.o");
  EXPECT_EQ(o.dtype, "F32");
  EXPECT_THAT(o.shape, ElementsAre(2, 4, 64));
  EXPECT_EQ(std::memcmp(o.data + o.bytes / 2, outputs.data(), o.bytes / 2), 0);
  const Tensor& s = parsed->tensors.at("layers.7.selected");
  EXPECT_EQ(s.dtype, "I32");
  EXPECT_THAT(s.shape, ElementsAre(2, 2, 5));
  EXPECT_EQ(std::memcmp(s.data + s.bytes / 2, selected.data(), s.bytes / 2), 0);
  EXPECT_EQ(std::to_integer<int>(parsed->tensors.at("layers.3.selected").data[0]), 0xff);
}

TEST(OutputDump, ReportsAFileThatCannotBeWritten) {
  const TemporaryDirectory directory;
  const Trace trace = MakeRandomTrace(directory, {.prompt_tokens = 10, .steps = 3});
  EXPECT_FALSE(OutputDump(trace, 1, 1).Write(directory.Path("no/such/folder")).ok());
}

}  // namespace
}  // namespace clusterkv::client::replay
