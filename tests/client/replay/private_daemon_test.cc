// With shell scripts in the place of clusterkvd.
#include "client/replay/private_daemon.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

#include "tests/client/replay/random_trace.h"

namespace clusterkv::client::replay {
namespace {

using ::testing::HasSubstr;

class PrivateDaemonTest : public testing::Test {
 protected:
  // A program that does `script`; its arguments are $@.
  absl::StatusOr<std::unique_ptr<PrivateDaemon>> Start(const std::string& script,
                                                       absl::Duration timeout = absl::Seconds(30)) {
    const std::string program = directory_.Path("daemon.sh");
    std::ofstream(program) << "#!/bin/sh\necho \"$@\" > " << directory_.Path("arguments") << "\n"
                           << script << "\n";
    EXPECT_EQ(chmod(program.c_str(), 0700), 0);
    PrivateDaemonOptions options;
    options.program = program;
    options.backend = "host";
    options.memory = {300ull << 20, 32ull << 20};
    options.start_timeout = timeout;
    return PrivateDaemon::Start(options);
  }

  std::string Arguments() const {
    std::ifstream in(directory_.Path("arguments"));
    return {std::istreambuf_iterator<char>(in), {}};
  }

  TemporaryDirectory directory_;
};

constexpr char kServe[] =
    "trap 'exit 0' TERM; echo READY grpc=unix:x admin=127.0.0.1:1; while :; do sleep 0.05; done";

TEST_F(PrivateDaemonTest, ServesUntilItIsStoppedAndLeavesNothing) {
  auto daemon = Start(kServe);
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const std::string address = (*daemon)->address();
  ASSERT_EQ(address.rfind("unix:", 0), 0u);
  const auto folder = std::filesystem::path(address.substr(5)).parent_path();
  EXPECT_TRUE(std::filesystem::exists(folder));
  EXPECT_THAT(Arguments(), HasSubstr("--listen " + address));
  EXPECT_THAT(Arguments(), HasSubstr("--host-memory 300mb --host-chunk 32mb"));
  EXPECT_THAT(Arguments(), HasSubstr("--backend host"));
  EXPECT_TRUE((*daemon)->Stop().ok());
  EXPECT_TRUE((*daemon)->Stop().ok());
  daemon->reset();
  EXPECT_FALSE(std::filesystem::exists(folder));
}

TEST_F(PrivateDaemonTest, ReportsAnUncleanEnd) {
  auto daemon = Start("trap 'exit 7' TERM; echo READY now; while :; do sleep 0.05; done");
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  EXPECT_THAT(std::string((*daemon)->Stop().message()), HasSubstr("exited with code 7"));
}

TEST_F(PrivateDaemonTest, PassesOnWhyItDidNotStart) {
  const std::pair<const char*, absl::StatusCode> ends[] = {
      {"2", absl::StatusCode::kInvalidArgument},
      {"3", absl::StatusCode::kUnavailable},
      {"4", absl::StatusCode::kResourceExhausted}};
  for (const auto& [code, expected] : ends) {
    const auto daemon = Start(std::string("echo no room >&2; exit ") + code);
    EXPECT_EQ(daemon.status().code(), expected);
    EXPECT_THAT(std::string(daemon.status().message()), HasSubstr("no room"));
  }
}

TEST_F(PrivateDaemonTest, NoticesThatItWasKilled) {
  const auto daemon = Start("kill -9 $$");
  EXPECT_EQ(daemon.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(daemon.status().message()), HasSubstr("signal 9"));
}

TEST_F(PrivateDaemonTest, WantsReadyInTime) {
  const auto slow = Start("sleep 20", absl::Milliseconds(200));
  EXPECT_EQ(slow.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(slow.status().message()), HasSubstr("not ready"));
  const auto other = Start("echo hello; sleep 20");
  EXPECT_THAT(std::string(other.status().message()), HasSubstr("\"hello\" instead of READY"));
}

TEST_F(PrivateDaemonTest, NeedsTheProgram) {
  PrivateDaemonOptions options;
  options.program = directory_.Path("nothing");
  const auto daemon = PrivateDaemon::Start(options);
  EXPECT_EQ(daemon.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(daemon.status().message()), HasSubstr("no such program"));
}

TEST(HostMemoryFor, GrowsWithSequencesAndHasAFloor) {
  const TemporaryDirectory directory;
  const Trace trace = MakeRandomTrace(directory, {});
  const gpu::MethodOptions method;
  EXPECT_EQ(HostMemoryFor(trace, method, 1, 1).total_bytes, 256ull << 20);
  EXPECT_EQ(HostMemoryFor(trace, method, 1, 1).chunk_bytes, 16ull << 20);
  const uint64_t sequence = 190ull * trace.shape().token_bytes();
  EXPECT_GE(HostMemoryFor(trace, method, 4, 1000).total_bytes, 4 * 1000 * sequence);
}

TEST(HostMemoryFor, HasChunksThatHoldTheLongestSegment) {
  const TemporaryDirectory directory;
  const Trace trace =
      MakeRandomTrace(directory, {.prompt_tokens = 9000, .steps = 1, .head_dim = 256});
  gpu::MethodOptions method;
  method.prompt_segment_tokens = 65'536;
  const HostMemory memory = HostMemoryFor(trace, method, 1, 1);
  EXPECT_GE(memory.chunk_bytes, 8 * 9001 * trace.shape().row_bytes());
  EXPECT_EQ(memory.total_bytes % memory.chunk_bytes, 0u);
}

}  // namespace
}  // namespace clusterkv::client::replay
