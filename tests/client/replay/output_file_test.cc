#include "client/replay/output_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "tests/client/replay/random_trace.h"

namespace clusterkv::client::replay {
namespace {

std::string Read(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TEST(OutputFile, TakesThePlaceOfWhatWasThereOnlyAtTheEnd) {
  const TemporaryDirectory directory;
  const std::string path = directory.Path("report.html");
  std::ofstream(path) << "old";
  auto file = OutputFile::Create(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(Read(path), "old");
  EXPECT_TRUE((*file)->Commit("new").ok());
  EXPECT_EQ(Read(path), "new");
  file->reset();
  EXPECT_EQ(Read(path), "new");
  EXPECT_FALSE(std::filesystem::exists(path + ".part"));
}

TEST(OutputFile, LeavesNothingIfTheRunFails) {
  const TemporaryDirectory directory;
  const std::string path = directory.Path("report.html");
  OutputFile::Create(path).value().reset();
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_FALSE(std::filesystem::exists(path + ".part"));
}

TEST(OutputFile, APlaceThatCannotBeWrittenIsKnownAtOnce) {
  const TemporaryDirectory directory;
  for (const std::string& path : {directory.Path("none/report.html"), directory.Path("")}) {
    const auto file = OutputFile::Create(path);
    EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(file.status().message()), testing::HasSubstr(path));
  }
}

}  // namespace
}  // namespace clusterkv::client::replay
