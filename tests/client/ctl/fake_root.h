// A folder that plays "/" for Machine.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace clusterkv::client::ctl {

class FakeRoot {
 public:
  FakeRoot() {
    std::string name = testing::TempDir() + "ckv-root-XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~FakeRoot() { std::filesystem::remove_all(path_); }
  FakeRoot(const FakeRoot&) = delete;
  FakeRoot& operator=(const FakeRoot&) = delete;

  const std::string& path() const { return path_; }

  FakeRoot& Write(const std::string& file, const std::string& text) {
    const std::filesystem::path target = path_ + file;
    std::filesystem::create_directories(target.parent_path());
    std::ofstream(target) << text << "\n";
    return *this;
  }
  FakeRoot& Program(const std::string& file, const std::string& script) {
    Write(file, "#!/bin/sh\n" + script);
    std::filesystem::permissions(path_ + file, std::filesystem::perms::owner_all);
    return *this;
  }
  FakeRoot& Gpu(const std::string& address, const std::string& node = "0") {
    const std::string folder = "/sys/bus/pci/devices/" + address;
    return Write(folder + "/vendor", "0x10de")
        .Write(folder + "/class", "0x030200")
        .Write(folder + "/numa_node", node);
  }

 private:
  std::string path_;
};

}  // namespace clusterkv::client::ctl
