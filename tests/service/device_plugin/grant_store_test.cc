// The grants on disk: what is there after a restart, and after a crash at any point.
#include "service/device_plugin/grant_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "tests/service/temporary_pool.h"

namespace clusterkv::service {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr GrantId kA = 0xa, kB = 0xb00000000000000b;

class GrantStoreTest : public testing::Test {
 protected:
  std::unique_ptr<GrantStore> Open() {
    auto store = GrantStore::Open(path_);
    EXPECT_TRUE(store.ok()) << store.status();
    return store.ok() ? *std::move(store) : nullptr;
  }
  // As the next daemon finds it.
  std::vector<GrantRecord> Reload() {
    const auto records = Open()->Load();
    EXPECT_TRUE(records.ok()) << records.status();
    return records.ok() ? *records : std::vector<GrantRecord>();
  }
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(path_)) {
      names.push_back(entry.path().filename().string());
    }
    std::ranges::sort(names);
    return names;
  }
  void Write(const std::string& name, const std::string& text) {
    std::ofstream(path_ + "/" + name) << text;
  }
  static mode_t ModeOf(const std::string& path) {
    struct stat status {};
    EXPECT_EQ(stat(path.c_str(), &status), 0) << path;
    return status.st_mode & 07777;
  }

  TemporaryDirectory directory_;
  const std::string path_ = directory_.path() + "/deep/grants";
};

TEST_F(GrantStoreTest, AGrantOutlivesTheDaemon) {
  const GrantRecord a{kA, {"gib-0", "gib-7"}}, b{kB, {"gib-1"}};
  {
    const auto store = Open();
    ASSERT_TRUE(store->Add(b).ok());
    ASSERT_TRUE(store->Add(a).ok());
    EXPECT_EQ(store->folder(kA), path_ + "/000000000000000a");
  }
  EXPECT_THAT(Reload(), ElementsAre(a, b));
  EXPECT_THAT(Reload(), ElementsAre(a, b));
  const auto store = Open();
  ASSERT_TRUE(store->Remove(kA).ok());
  EXPECT_FALSE(fs::exists(store->folder(kA)));
  ASSERT_TRUE(store->Remove(kA).ok());  // once more does nothing
  EXPECT_THAT(*store->Load(), ElementsAre(b));
}

// The parent keeps everyone out; a container, which sees the folder alone, may have any uid.
TEST_F(GrantStoreTest, ModesDoNotDependOnTheMask) {
  const mode_t before = umask(0077);
  const auto store = Open();
  ASSERT_TRUE(store->Add({kA, {"gib-0"}}).ok());
  umask(before);
  EXPECT_EQ(ModeOf(path_), 0700u);
  EXPECT_EQ(ModeOf(store->folder(kA)), 0755u);
  EXPECT_EQ(ModeOf(store->folder(kA) + ".json"), 0600u);
}

TEST_F(GrantStoreTest, AMountedFolderStaysTheSameOne) {
  struct stat before {
  }, after{};
  {
    const auto store = Open();
    ASSERT_TRUE(store->Add({kA, {"gib-0"}}).ok());
    ASSERT_EQ(stat(store->folder(kA).c_str(), &before), 0);
  }
  const auto store = Open();
  ASSERT_TRUE(store->Load().ok());
  ASSERT_EQ(stat(store->folder(kA).c_str(), &after), 0);
  EXPECT_EQ(before.st_ino, after.st_ino);
}

TEST_F(GrantStoreTest, AFolderThatIsGoneComesBackWithItsRecord) {
  { ASSERT_TRUE(Open()->Add({kA, {"gib-0"}}).ok()); }
  fs::remove_all(path_ + "/000000000000000a");
  EXPECT_EQ(Reload().size(), 1u);
  EXPECT_TRUE(fs::is_directory(path_ + "/000000000000000a"));
}

TEST_F(GrantStoreTest, WhatACrashLeftIsCleared) {
  { ASSERT_TRUE(Open()->Add({kA, {"gib-0"}}).ok()); }
  // Before the record was renamed, and after it was removed.
  fs::create_directories(path_ + "/000000000000000c");
  Write("000000000000000c.json.new", "{\"ver");
  fs::create_directories(path_ + "/000000000000000d");
  Write("000000000000000d/clusterkvd.sock", "");
  // Somebody else's.
  fs::create_directories(path_ + "/lost+found");
  Write("notes.json", "{}");
  EXPECT_EQ(Reload().size(), 1u);
  EXPECT_THAT(Names(), ElementsAre("000000000000000a", "000000000000000a.json", "lock",
                                   "lost+found", "notes.json"));
}

TEST_F(GrantStoreTest, ARecordThatIsNoneIsDropped) {
  { ASSERT_TRUE(Open()->Add({kA, {"gib-0"}}).ok()); }
  const std::string bad[] = {"", "{", "[]", "{\"version\":2,\"devices\":[\"gib-1\"]}",
                             "{\"version\":1}", "{\"version\":1,\"devices\":\"gib-1\"}",
                             "{\"version\":1,\"devices\":[1]}",
                             // Also of the grant before it.
                             "{\"version\":1,\"devices\":[\"gib-1\",\"gib-0\"]}"};
  for (const std::string& text : bad) {
    SCOPED_TRACE(text);
    fs::create_directories(path_ + "/00000000000000ff");
    Write("00000000000000ff.json", text);
    EXPECT_THAT(Reload(), ElementsAre(GrantRecord{kA, {"gib-0"}}));
    EXPECT_THAT(Names(), ElementsAre("000000000000000a", "000000000000000a.json", "lock"));
  }
  // The devices of one that was dropped are not taken.
  Write("00000000000000fe.json", bad[7]);
  Write("00000000000000ff.json", "{\"version\":1,\"devices\":[\"gib-1\"]}");
  EXPECT_EQ(Reload().size(), 2u);
}

TEST_F(GrantStoreTest, ASecondDaemonIsRefused) {
  const auto first = Open();
  const auto second = GrantStore::Open(path_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(path_));
}

TEST_F(GrantStoreTest, ErrorsNameThePathAndLeaveNothing) {
  const std::string file = directory_.path() + "/file";
  std::ofstream(file) << "x";
  const auto in_a_file = GrantStore::Open(file + "/grants");
  EXPECT_FALSE(in_a_file.ok());
  EXPECT_THAT(std::string(in_a_file.status().message()), HasSubstr(file));
  const auto store = Open();
  // A folder where the record should go.
  fs::create_directories(path_ + "/000000000000000a.json/x");
  const absl::Status failed = store->Add({kA, {"gib-0"}});
  EXPECT_FALSE(failed.ok());
  EXPECT_THAT(std::string(failed.message()), HasSubstr("000000000000000a.json"));
  EXPECT_FALSE(fs::exists(path_ + "/000000000000000a.json.new"));
}

}  // namespace
}  // namespace clusterkv::service
