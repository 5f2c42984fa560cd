#include "tests/client/replay/random_trace.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/replay/safetensors.h"
#include "gpu/host/simd.h"

namespace clusterkv::client::replay {
namespace {

const char* FileDType(gpu::DType dtype) {
  switch (dtype) {
    case gpu::DType::kBf16:
      return "BF16";
    case gpu::DType::kFp16:
      return "F16";
    case gpu::DType::kFp32:
      return "F32";
  }
  return "";
}

}  // namespace

TemporaryDirectory::TemporaryDirectory() {
  std::string pattern = testing::TempDir() + "/replay-test-XXXXXX";
  EXPECT_NE(mkdtemp(pattern.data()), nullptr);
  path_ = pattern;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

void WriteRandomTrace(const std::string& path, const RandomTraceOptions& options,
                      const std::map<std::string, std::string>& changes) {
  std::mt19937 random(options.seed);
  std::normal_distribution<float> normal;
  const uint32_t tokens = options.prompt_tokens + options.steps;
  std::vector<std::vector<std::byte>> storage;
  std::vector<TensorSource> tensors;
  const auto add = [&](const std::string& name, uint32_t rows, uint32_t heads, float spread) {
    std::vector<float> values(size_t{rows} * heads * options.head_dim);
    for (float& value : values) value = spread * normal(random);
    storage.emplace_back(values.size() * gpu::SizeOf(options.dtype));
    gpu::host::FromFloat(options.dtype, values.data(), storage.back().data(), values.size());
    tensors.push_back({name, FileDType(options.dtype), {rows, heads, options.head_dim}, {}});
  };
  for (const uint32_t layer : options.layers) {
    add(absl::StrCat("layers.", layer, ".k"), tokens, options.kv_heads, options.key_spread);
    add(absl::StrCat("layers.", layer, ".v"), tokens, options.kv_heads, 1.0f);
    add(absl::StrCat("layers.", layer, ".q"), options.steps, options.q_heads, options.spread);
  }
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].data = storage[i];
  std::map<std::string, std::string> metadata = {
      {"format", "clusterkv-trace/1"},
      {"model", "random"},
      {"layers", absl::StrJoin(options.layers, ",")},
      {"prompt_tokens", absl::StrCat(options.prompt_tokens)},
      {"decode_tokens", absl::StrCat(options.steps)},
      {"softmax_scale", "0.125"}};
  for (const auto& [key, value] : changes) {
    metadata[key] = value;
    if (value.empty()) metadata.erase(key);
  }
  const absl::Status written = WriteSafetensors(path, metadata, tensors);
  ASSERT_TRUE(written.ok()) << written;
}

Trace MakeRandomTrace(const TemporaryDirectory& directory, const RandomTraceOptions& options) {
  const std::string path = directory.Path("random.safetensors");
  WriteRandomTrace(path, options);
  absl::StatusOr<Trace> trace = Trace::Open(path);
  EXPECT_TRUE(trace.ok()) << trace.status();
  return *std::move(trace);
}

}  // namespace clusterkv::client::replay
