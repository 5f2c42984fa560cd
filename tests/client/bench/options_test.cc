#include "client/bench/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace clusterkv::client::bench {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

absl::StatusOr<std::optional<BenchOptions>> Parse(std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "clusterkv-bench");
  return ParseOptions(static_cast<int>(arguments.size()), arguments.data());
}

TEST(BenchOptions, HaveDefaults) {
  const auto parsed = Parse({});
  ASSERT_TRUE(parsed.ok() && parsed->has_value()) << parsed.status();
  const BenchOptions& options = **parsed;
  EXPECT_THAT(options.operations, ElementsAreArray(OperationNames()));
  EXPECT_THAT(options.contexts, ElementsAre(8192, 32'768, 131'072));
  EXPECT_THAT(options.batches, ElementsAre(1, 4, 16));
  EXPECT_THAT(options.budgets, ElementsAre(1024, 2048));
  EXPECT_THAT(options.misses, ElementsAre(0, 5, 10, 20));
  EXPECT_THAT(options.decode_misses, ElementsAre(5, 10, 20, 40));
  EXPECT_TRUE(options.kmeans.empty());
  EXPECT_EQ(options.shape, (gpu::Shape{.layers = 32,
                                       .kv_heads = 8,
                                       .q_heads = 32,
                                       .head_dim = 128,
                                       .dtype = gpu::DType::kBf16}));
  EXPECT_EQ(options.preset, "default");
  EXPECT_EQ(options.backend, "auto");
  EXPECT_EQ(options.format, Format::kText);
}

TEST(BenchOptions, AreRead) {
  const auto parsed = Parse({"--ops",
                             "step,h2d,step",
                             "--contexts",
                             "2k,4096",
                             "--batches=2",
                             "--budgets",
                             "64,1k",
                             "--misses",
                             "50,0",
                             "--kmeans",
                             "8x2kx64,1x100x7",
                             "--layers",
                             "2",
                             "--kv-heads",
                             "4",
                             "--q-heads",
                             "8",
                             "--head-dim",
                             "64",
                             "--dtype",
                             "fp32",
                             "--preset",
                             "paper",
                             "--backend",
                             "host",
                             "--host-memory",
                             "2gb",
                             "--store-memory",
                             "64mb",
                             "--repeats",
                             "7",
                             "--seed",
                             "5",
                             "--format",
                             "json"});
  ASSERT_TRUE(parsed.ok() && parsed->has_value()) << parsed.status();
  const BenchOptions& options = **parsed;
  EXPECT_THAT(options.operations, ElementsAre("h2d", "step"));
  EXPECT_TRUE(options.Has("step"));
  EXPECT_FALSE(options.Has("select"));
  EXPECT_THAT(options.contexts, ElementsAre(2048, 4096));
  EXPECT_THAT(options.batches, ElementsAre(2));
  EXPECT_THAT(options.budgets, ElementsAre(64, 1024));
  EXPECT_THAT(options.misses, ElementsAre(50, 0));
  EXPECT_THAT(options.kmeans, ElementsAre(KmeansSize{8, 2048, 64}, KmeansSize{1, 100, 7}));
  EXPECT_EQ(options.shape.dtype, gpu::DType::kFp32);
  EXPECT_EQ(options.shape.q_heads, 8u);
  EXPECT_EQ(options.method.tokens_per_cluster, 80u);
  EXPECT_EQ(options.host_memory, 2ull << 30);
  EXPECT_EQ(options.store_memory, 64ull << 20);
  EXPECT_EQ(options.repeats, 7u);
  EXPECT_EQ(options.seed, 5u);
  EXPECT_EQ(options.format, Format::kJson);
}

TEST(BenchOptions, NameTheBadOptionAndWhatIsAllowed) {
  const std::pair<std::vector<const char*>, std::pair<const char*, const char*>> cases[] = {
      {{"--what"}, {"--what", "not expected"}},
      {{"--ops", "step,best"}, {"--ops", "permute-offload"}},
      {{"--contexts", "2m"}, {"--contexts", "with k"}},
      {{"--contexts", "100"}, {"--contexts", "1024 to"}},
      {{"--contexts", "99999999999999999999k"}, {"--contexts", "1024 to"}},
      {{"--batches", "0"}, {"--batches", "1 to 512"}},
      {{"--batches", "1,"}, {"--batches", "1 to 512"}},
      {{"--budgets", "-1"}, {"--budgets", "1 to"}},
      {{"--misses", "101"}, {"--misses", "0 to 100"}},
      {{"--decode-misses", "many"}, {"--decode-misses", "0 to 100"}},
      {{"--kmeans", "8x8192"}, {"--kmeans", "PROBLEMSxTOKENSxCLUSTERS"}},
      {{"--kmeans", "8x100x101"}, {"--kmeans", "1 to 100"}},
      {{"--layers", "0"}, {"--layers", "1 to"}},
      {{"--q-heads", "12"}, {"q_heads", "kv_heads"}},
      {{"--head-dim", "100"}, {"head_dim", "64, 96, 128, 256"}},
      {{"--dtype", "fp8"}, {"--dtype", "bf16, fp16, fp32"}},
      {{"--preset", "best"}, {"preset", "default, paper"}},
      {{"--backend", "tpu"}, {"--backend", "auto, host, cuda"}},
      {{"--host-memory", "many"}, {"--host-memory", "gb"}},
      {{"--store-memory", "1mb"}, {"--store-memory", "mb"}},
      {{"--repeats", "0"}, {"--repeats", "1 to"}},
      {{"--seed", "-1"}, {"--seed", "0 to"}},
      {{"--format", "xml"}, {"--format", "text, json"}},
  };
  for (const auto& [arguments, parts] : cases) {
    const auto parsed = Parse(arguments);
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << parts.first;
    EXPECT_THAT(std::string(parsed.status().message()),
                AllOf(HasSubstr(parts.first), HasSubstr(parts.second)));
  }
}

TEST(BenchOptions, HelpIsNoError) {
  testing::internal::CaptureStdout();
  const auto parsed = Parse({"--help"});
  EXPECT_THAT(testing::internal::GetCapturedStdout(), HasSubstr("--misses"));
  ASSERT_TRUE(parsed.ok());
  EXPECT_FALSE(parsed->has_value());
}

}  // namespace
}  // namespace clusterkv::client::bench
