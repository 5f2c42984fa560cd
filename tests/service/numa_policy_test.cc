#include "service/numa_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <numaif.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <functional>
#include <thread>
#include <vector>

#include "gpu/numa_nodes.h"
#include "tests/service/temporary_pool.h"

namespace clusterkv::service {
namespace {

constexpr uint64_t kChunk = 64 << 10;
constexpr unsigned long kMaxNode = 1025;  // the calls count one more than they read

struct Policy {
  int mode = -1;
  std::array<unsigned long, 16> nodes{};
  bool operator==(const Policy&) const = default;
};

Policy CurrentPolicy() {
  Policy policy;
  EXPECT_EQ(get_mempolicy(&policy.mode, policy.nodes.data(), kMaxNode, nullptr, 0), 0);
  return policy;
}

// A thread whose calls for memory policies are refused, as by a container's seccomp profile.
void WithoutPolicyCalls(const std::function<void()>& body) {
  std::thread([&] {
    std::array<sock_filter, 5> code{{BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                                     BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_set_mempolicy, 2, 0),
                                     BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_get_mempolicy, 1, 0),
                                     BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
                                     BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)}};
    const sock_fprog program{.len = code.size(), .filter = code.data()};
    ASSERT_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    ASSERT_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
    body();
  }).join();
}

// Where this machine itself refuses the calls there is nothing to see.
class NumaPolicy : public testing::Test {
 protected:
  void SetUp() override {
    if (absl::IsPermissionDenied(PreferredNode::Create(0).status())) {
      GTEST_SKIP() << "memory policies may not be set here";
    }
    for (const int node : gpu::MemoryNodes()) {
      if (PreferredNode::Create(node).ok()) nodes_.insert(node);  // else a cpuset keeps it from us
    }
    ASSERT_FALSE(nodes_.empty());
  }

  std::set<int> nodes_;
};

TEST(HostPoolNode, IsTheDevicesWhereThereIsAChoice) {
  Config config;
  EXPECT_EQ(HostPoolNode(config, 1, {0, 1}), 1);
  EXPECT_EQ(HostPoolNode(config, std::nullopt, {0, 1}), std::nullopt) << "the host backend";
  EXPECT_EQ(HostPoolNode(config, 2, {0, 1}), std::nullopt) << "a node without memory";
  EXPECT_EQ(HostPoolNode(config, 0, {0}), std::nullopt);
  EXPECT_EQ(HostPoolNode(config, 0, {}), std::nullopt);
  config.host_numa = NumaPlacement::kOff;
  EXPECT_EQ(HostPoolNode(config, 1, {0, 1}), std::nullopt);
  config.host_numa = NumaPlacement::kNode;
  config.host_numa_node = 0;
  EXPECT_EQ(HostPoolNode(config, 1, {0, 1}), 0);
  EXPECT_EQ(HostPoolNode(config, std::nullopt, {0}), 0) << "asked for by its number";
}

TEST_F(NumaPolicy, LastsAsLongAsThePreferenceAndGoesBackToWhatWasBefore) {
  const Policy before = CurrentPolicy();
  const int node = *nodes_.begin();
  {
    const auto preferred = PreferredNode::Create(node);
    ASSERT_TRUE(preferred.ok()) << preferred.status();
    const Policy within = CurrentPolicy();
    EXPECT_EQ(within.mode, MPOL_PREFERRED);
    EXPECT_EQ(within.nodes[0], 1ul << node);
    EXPECT_TRUE(HasMemoryPolicy());
    {
      const auto again = PreferredNode::Create(node);
      ASSERT_TRUE(again.ok()) << again.status();
    }
    EXPECT_EQ(CurrentPolicy(), within) << "also one that is no default";
  }
  EXPECT_EQ(CurrentPolicy(), before);
}

TEST_F(NumaPolicy, RefusesANodeThatIsNotThere) {
  const Policy before = CurrentPolicy();
  for (const int node : {-1, 1023, 1024}) {
    EXPECT_EQ(PreferredNode::Create(node).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(CurrentPolicy(), before);
}

TEST_F(NumaPolicy, PagesOfAPoolLieOnTheNodeThatWasAskedFor) {
  for (const int node : nodes_) {
    const TemporaryDirectory directory("/dev/shm/");
    const auto pool = HostPool::Create({.directory = directory.path(),
                                        .total_bytes = 4 * kChunk,
                                        .chunk_bytes = kChunk,
                                        .numa_node = node});
    ASSERT_TRUE(pool.ok()) << pool.status();
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    std::vector<void*> pages;
    for (PoolChunk chunk = 0; chunk < (*pool)->chunk_count(); ++chunk) {
      for (uint64_t offset = 0; offset < kChunk; offset += page) {
        std::byte* const address = (*pool)->data(chunk) + offset;
        *address = std::byte{1};  // only what this process has mapped can be asked for
        pages.push_back(address);
      }
    }
    std::vector<int> found(pages.size(), -1);
    ASSERT_EQ(move_pages(0, pages.size(), pages.data(), nullptr, found.data(), 0), 0);
    EXPECT_THAT(found, testing::Each(node));
    EXPECT_EQ(*NodeOfPage(pages.back()), node);
  }
}

TEST_F(NumaPolicy, OfTheThreadIsNotChangedByAPool) {
  const Policy before = CurrentPolicy();
  const TemporaryDirectory directory;
  ASSERT_TRUE(HostPool::Create({.directory = directory.path(),
                                .total_bytes = kChunk,
                                .chunk_bytes = kChunk,
                                .numa_node = *nodes_.begin()})
                  .ok());
  EXPECT_EQ(CurrentPolicy(), before);
}

TEST(NumaPolicyForbidden, IsReportedAndAPoolServesAllTheSame) {
  WithoutPolicyCalls([] {
    EXPECT_FALSE(HasMemoryPolicy());
    const int here = 0;
    EXPECT_TRUE(absl::IsPermissionDenied(NodeOfPage(&here).status()));
    const auto preferred = PreferredNode::Create(0);
    EXPECT_TRUE(absl::IsPermissionDenied(preferred.status())) << preferred.status();
    const TemporaryDirectory directory;
    testing::internal::CaptureStderr();
    const auto pool = HostPool::Create({.directory = directory.path(),
                                        .total_bytes = 2 * kChunk,
                                        .chunk_bytes = kChunk,
                                        .numa_node = 0});
    const std::string log = testing::internal::GetCapturedStderr();
    ASSERT_TRUE(pool.ok()) << pool.status();
    EXPECT_EQ((*pool)->chunk_count(), 2u);
    EXPECT_THAT(log, testing::HasSubstr("cannot choose the NUMA node of host memory"));
  });
}

TEST(NodeOfPage, OfWhatIsNotMappedIsAnError) { EXPECT_FALSE(NodeOfPage(nullptr).ok()); }

}  // namespace
}  // namespace clusterkv::service
