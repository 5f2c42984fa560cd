#include "client/replay/scratch_directory.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

#include "tests/client/replay/random_trace.h"

namespace clusterkv::client::replay {
namespace {

namespace fs = std::filesystem;

TEST(ScratchDirectory, GoesWithAllThatIsInIt) {
  const TemporaryDirectory base;
  auto scratch = ScratchDirectory::Create(base.Path("."));
  ASSERT_TRUE(scratch.ok()) << scratch.status();
  const std::string path = (*scratch)->path();
  struct stat state = {};
  ASSERT_EQ(stat(path.c_str(), &state), 0);
  EXPECT_EQ(state.st_mode & 0777u, 0700u);
  fs::create_directory(path + "/host");
  std::ofstream(path + "/host/chunk") << "bytes";
  scratch->reset();
  EXPECT_FALSE(fs::exists(path));
}

TEST(ScratchDirectory, RemovesWhatAKilledOwnerLeft) {
  const TemporaryDirectory base;
  fs::create_directories(base.Path("clusterkv-replay-dead00/host"));
  fs::create_directories(base.Path("other-dead00"));
  const auto scratch = ScratchDirectory::Create(base.Path("."), absl::ZeroDuration());
  ASSERT_TRUE(scratch.ok()) << scratch.status();
  EXPECT_FALSE(fs::exists(base.Path("clusterkv-replay-dead00")));
  EXPECT_TRUE(fs::exists(base.Path("other-dead00")));
}

TEST(ScratchDirectory, LeavesTheLivingAndTheNewAlone) {
  const TemporaryDirectory base;
  const auto living = ScratchDirectory::Create(base.Path("."));
  ASSERT_TRUE(living.ok()) << living.status();
  fs::create_directories(base.Path("clusterkv-replay-new000"));
  ASSERT_TRUE(ScratchDirectory::Create(base.Path(".")).ok());
  EXPECT_TRUE(fs::exists(base.Path("clusterkv-replay-new000")));
  ASSERT_TRUE(ScratchDirectory::Create(base.Path("."), absl::ZeroDuration()).ok());
  EXPECT_TRUE(fs::exists((*living)->path()));
}

TEST(ScratchDirectory, ReportsABaseThatIsNotThere) {
  const TemporaryDirectory base;
  EXPECT_FALSE(ScratchDirectory::Create(base.Path("nothing")).ok());
}

}  // namespace
}  // namespace clusterkv::client::replay
