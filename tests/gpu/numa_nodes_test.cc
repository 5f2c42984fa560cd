#include "gpu/numa_nodes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace clusterkv::gpu {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// A folder that plays /sys.
class NumaNodes : public testing::Test {
 protected:
  NumaNodes() {
    std::string name = testing::TempDir() + "ckv-sys-XXXXXX";
    sysfs_ = mkdtemp(name.data());
  }
  ~NumaNodes() override { std::filesystem::remove_all(sysfs_); }

  void Write(const std::string& file, const std::string& text) {
    const std::filesystem::path path = sysfs_ + file;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }

  std::string sysfs_;
};

TEST(NodeList, ReadsWhatTheKernelWrites) {
  EXPECT_THAT(ParseNodeList("0"), ElementsAre(0));
  EXPECT_THAT(ParseNodeList("0-2,4,7-8\n"), ElementsAre(0, 1, 2, 4, 7, 8));
  EXPECT_THAT(ParseNodeList(""), IsEmpty());
  EXPECT_THAT(ParseNodeList("\n"), IsEmpty());
  EXPECT_THAT(ParseNodeList("x,1,2-y"), ElementsAre(1));
}

TEST_F(NumaNodes, AreThoseWithMemory) {
  EXPECT_THAT(MemoryNodes(sysfs_), IsEmpty()) << "a kernel that knows none";
  Write("/devices/system/node/online", "0-3\n");
  Write("/devices/system/node/has_memory", "0,2\n");
  EXPECT_THAT(MemoryNodes(sysfs_), ElementsAre(0, 2));
}

TEST_F(NumaNodes, OfAPciDeviceIsTheOneItIsNextTo) {
  Write("/bus/pci/devices/0000:1b:00.0/numa_node", "1\n");
  Write("/bus/pci/devices/0000:65:00.0/numa_node", "-1\n");
  Write("/bus/pci/devices/0000:9a:00.0/numa_node", "\n");
  EXPECT_EQ(NodeOfPciDevice("0000:1B:00.0", sysfs_), 1) << "as CUDA writes addresses";
  EXPECT_EQ(NodeOfPciDevice("0000:1b:00.0", sysfs_), 1);
  EXPECT_EQ(NodeOfPciDevice("0000:65:00.0", sysfs_), std::nullopt) << "the firmware does not say";
  EXPECT_EQ(NodeOfPciDevice("0000:9a:00.0", sysfs_), std::nullopt);
  EXPECT_EQ(NodeOfPciDevice("0000:ff:00.0", sysfs_), std::nullopt);
}

}  // namespace
}  // namespace clusterkv::gpu
