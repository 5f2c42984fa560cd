// Grants: allocating, revoking, restarting, failing half way; over a real core and a real store.
#include "service/device_plugin/grants.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <set>

#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class RecordedSockets : public GrantSockets {
 public:
  absl::Status Open(GrantId grant, const std::string& folder) override {
    if (fail_after == 0) return absl::UnavailableError("no socket today");
    --fail_after;
    EXPECT_TRUE(std::filesystem::is_directory(folder));
    EXPECT_TRUE(open.emplace(grant, folder).second);
    return absl::OkStatus();
  }
  void Close(GrantId grant) override { open.erase(grant); }
  void SetServing(bool) override {}
  void CloseAll(absl::Duration) override { open.clear(); }

  std::map<GrantId, std::string> open;
  int fail_after = 1000;
};

class GrantsTest : public CoreTest {
 protected:
  static constexpr uint32_t kDevices = 6;  // of four chunks

  void SetUp() override { Start(); }
  void Start(uint32_t devices = kDevices) {
    if (core_ == nullptr) StartCore({.version = "test", .offered_bytes = kDevices * 4 * kChunk});
    auto grants = Grants::Open(
        {.directory = directory_.path(), .devices = devices, .device_bytes = 4 * kChunk}, *core_,
        sockets_);
    ASSERT_TRUE(grants.ok()) << grants.status();
    grants_ = *std::move(grants);
  }
  // Another daemon finds the folder.
  void Restart(uint32_t devices = kDevices) {
    grants_.reset();
    sockets_.open.clear();
    core_->Stop();
    core_.reset();
    pool_ = std::make_unique<TemporaryPool>(32, kChunk);
    auto host = gpu::CreateDevice({.backend = "host", .threads = 1});
    ASSERT_TRUE(host.ok());
    auto device = std::make_unique<GatedDevice>(*std::move(host));
    device_ = device.get();
    auto core = ServiceCore::Create(
        {.version = "test", .boot_epoch = kEpoch, .offered_bytes = devices * 4 * kChunk},
        std::move(device), pool_->Take());
    ASSERT_TRUE(core.ok()) << core.status();
    core_ = *std::move(core);
    Start(devices);
  }
  Grant MustAllocate(const DeviceIds& devices) {
    const auto made = grants_->Allocate({devices});
    EXPECT_TRUE(made.ok()) << made.status();
    return made.ok() ? made->front() : Grant{};
  }
  std::map<GrantId, uint64_t> InTheCore() {
    Fence();
    std::map<GrantId, uint64_t> grants;
    for (const GrantStatus& one : core_->status().grants) grants[one.grant] = one.host.total_bytes;
    return grants;
  }
  size_t OnDisk() const {
    size_t records = 0;
    for (const auto& entry : std::filesystem::directory_iterator(directory_.path())) {
      if (entry.path().extension() == ".json") ++records;
    }
    return records;
  }
  // All three places agree.
  void ExpectGrants(const std::map<GrantId, uint64_t>& expected) {
    EXPECT_EQ(InTheCore(), expected);
    EXPECT_EQ(sockets_.open.size(), expected.size());
    for (const auto& [grant, bytes] : expected) EXPECT_TRUE(sockets_.open.contains(grant));
    EXPECT_EQ(OnDisk(), expected.size());
    EXPECT_EQ(grants_->count(), expected.size());
  }

  TemporaryDirectory directory_;
  std::unique_ptr<TemporaryPool> pool_;
  RecordedSockets sockets_;
  std::unique_ptr<Grants> grants_;
};

TEST_F(GrantsTest, EachContainerGetsAGrantOfItsOwn) {
  EXPECT_THAT(grants_->devices(),
              ElementsAre("gib-0", "gib-1", "gib-2", "gib-3", "gib-4", "gib-5"));
  const auto made = grants_->Allocate({{"gib-0", "gib-3"}, {"gib-5"}});
  ASSERT_TRUE(made.ok()) << made.status();
  ASSERT_EQ(made->size(), 2u);
  EXPECT_NE((*made)[0].grant, (*made)[1].grant);
  EXPECT_EQ((*made)[0].bytes, 8 * kChunk);
  EXPECT_EQ((*made)[0].folder, directory_.path() + "/" + GrantText((*made)[0].grant));
  ExpectGrants({{(*made)[0].grant, 8 * kChunk}, {(*made)[1].grant, 4 * kChunk}});
  EXPECT_THAT(*grants_->Allocate({}), IsEmpty());
}

TEST_F(GrantsTest, WhatCannotBeMeantChangesNothing) {
  const Grant grant = MustAllocate({"gib-0"});
  const std::pair<std::vector<DeviceIds>, const char*> cases[] = {
      {{{"gib-6"}}, "gib-0 to gib-5"},
      {{{"gib-1"}, {"gib-00"}}, "unknown device 'gib-00'"},
      {{{"gib--1"}}, "unknown"},
      {{{"gib- 1"}}, "unknown"},
      {{{"gib-4294967296"}}, "unknown"},
      {{{""}}, "unknown"},
      {{{"gib-1", "gib-1"}}, "gib-1 is asked for twice"},
      {{{"gib-1"}, {"gib-2", "gib-1"}}, "twice"},
      {{{"gib-1"}, {}}, "no device"},
      {{{"gib-0", "gib-9"}}, "unknown device 'gib-9'"},
  };
  for (const auto& [containers, message] : cases) {
    const auto made = grants_->Allocate(containers);
    EXPECT_EQ(made.status().code(), StatusCode::kInvalidArgument) << message;
    EXPECT_THAT(std::string(made.status().message()), HasSubstr(message));
    ExpectGrants({{grant.grant, 4 * kChunk}});
  }
}

TEST_F(GrantsTest, AllocatingADeviceAgainRevokesWhoeverHadIt) {
  const Grant first = MustAllocate({"gib-0", "gib-1"});
  const Grant second = MustAllocate({"gib-2"});
  const Grant third = MustAllocate({"gib-3"});
  Worker worker = Attached(first.grant);
  const Grant fresh = MustAllocate({"gib-1", "gib-2"});
  ExpectGrants({{third.grant, 4 * kChunk}, {fresh.grant, 8 * kChunk}});
  EXPECT_FALSE(std::filesystem::exists(first.folder));
  ASSERT_EQ(worker->told().ended.size(), 1u);
  EXPECT_EQ(worker->told().ended[0].code(), StatusCode::kAborted);
  EXPECT_THAT(std::string(worker->told().ended[0].message()),
              HasSubstr(GrantText(first.grant) + " was revoked: gib-1 was allocated anew"));
  (void)second;
}

TEST_F(GrantsTest, AFailureHalfWayLeavesNoGrant) {
  const Grant other = MustAllocate({"gib-5"});
  sockets_.fail_after = 1;
  const auto made = grants_->Allocate({{"gib-0"}, {"gib-1"}, {"gib-2"}});
  EXPECT_EQ(made.status().code(), StatusCode::kUnavailable);
  ExpectGrants({{other.grant, 4 * kChunk}});
  sockets_.fail_after = 1000;
  EXPECT_TRUE(grants_->Allocate({{"gib-0"}, {"gib-1"}, {"gib-2"}}).ok());
}

TEST_F(GrantsTest, NothingIsGrantedWhileTheDaemonDrains) {
  std::promise<void> idle;
  core_->Drain(absl::Seconds(5), [&idle] { idle.set_value(); });
  idle.get_future().wait();
  EXPECT_EQ(grants_->Allocate({{"gib-0"}}).status().code(), StatusCode::kUnavailable);
  ExpectGrants({});
}

TEST_F(GrantsTest, GrantsOutliveTheDaemonWithTheirFolders) {
  const Grant first = MustAllocate({"gib-0", "gib-1"});
  const Grant second = MustAllocate({"gib-4"});
  Restart();
  ExpectGrants({{first.grant, 8 * kChunk}, {second.grant, 4 * kChunk}});
  EXPECT_EQ(sockets_.open[first.grant], first.folder);
  const Grant fresh = MustAllocate({"gib-1"});
  ExpectGrants({{second.grant, 4 * kChunk}, {fresh.grant, 4 * kChunk}});
}

TEST_F(GrantsTest, AGrantShrinksWithThePool) {
  const Grant first = MustAllocate({"gib-1", "gib-5"});
  const Grant second = MustAllocate({"gib-4"});
  Restart(/*devices=*/2);
  ExpectGrants({{first.grant, 4 * kChunk}, {second.grant, 0}});
  Worker worker = Attached(second.grant);
  EXPECT_EQ(Register(worker, Request(FetchMode::kDirect, 1)).status().code(),
            StatusCode::kResourceExhausted);
  Restart();
  ExpectGrants({{first.grant, 8 * kChunk}, {second.grant, 4 * kChunk}});
}

TEST_F(GrantsTest, PrefersDevicesThatNobodyCouldMiss) {
  MustAllocate({"gib-0", "gib-1"});
  const Grant busy = MustAllocate({"gib-2"});
  Worker worker = Attached(busy.grant);
  Fence();
  const DeviceIds all = grants_->devices();
  EXPECT_THAT(grants_->Prefer({.available = all, .must_include = {}, .count = 3}),
              ElementsAre("gib-3", "gib-4", "gib-5"));
  EXPECT_THAT(grants_->Prefer({.available = all, .must_include = {}, .count = 5}),
              ElementsAre("gib-3", "gib-4", "gib-5", "gib-0", "gib-1"));
  EXPECT_THAT(grants_->Prefer({.available = all, .must_include = {"gib-2"}, .count = 2}),
              ElementsAre("gib-2", "gib-3"));
  EXPECT_THAT(grants_->Prefer({.available = {"gib-2"}, .must_include = {}, .count = 2}),
              ElementsAre("gib-2"));
  EXPECT_THAT(grants_->Prefer({}), IsEmpty());
}

// A revoked grant's worker that lives on holds its memory: the successor on its devices gets what
// is left, the others everything.
TEST_F(GrantsTest, TheSuccessorWaitsForMemoryThatIsStillMapped) {
  const Grant first = MustAllocate({"gib-0"});
  Worker stuck = Attached(first.grant);
  stuck->unmaps_chunks = false;
  const SequenceId sequence = MustRegister(stuck, FetchMode::kDirect);
  MustIngest(stuck, sequence, 0, 200, true);
  const Grant second = MustAllocate({"gib-0"});
  const Grant other = MustAllocate({"gib-1"});
  Worker successor = Attached(second.grant);
  Worker bystander = Attached(other.grant);
  RegisterRequest whole = Request(FetchMode::kDirect, 1);
  whole.max_tokens = 360;  // between three and four chunks
  EXPECT_TRUE(Register(bystander, whole).ok());
  const auto refused = Register(successor, whole);
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("former grants"));
  core_->WorkerDied(stuck->session);
  EXPECT_TRUE(AwaitStatus([](const DaemonStatus& s) { return s.host.quarantined_bytes == 0; }));
  EXPECT_TRUE(Register(successor, whole).ok());
}

}  // namespace
}  // namespace clusterkv::service
