// The files that tell of a machine: /proc, /sys, /dev and the like, below a root that is "/", or a
// folder of a test.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace clusterkv::client::ctl {

class Machine {
 public:
  explicit Machine(std::string root = "") : root_(std::move(root)) {}

  // All paths are absolute, without the root.
  std::string Path(const std::string& path) const { return root_ + path; }
  bool Exists(const std::string& path) const;
  // Without white space at its end; nullopt where it cannot be read.
  std::optional<std::string> Read(const std::string& path) const;
  // The names in a folder, sorted; empty where it cannot be read.
  std::vector<std::string> List(const std::string& path) const;
  // What `path --version` prints, its first 4 KiB; nullopt if it is not there, fails, or takes
  // longer than a few seconds.
  std::optional<std::string> VersionOf(const std::string& path) const;

 private:
  const std::string root_;
};

}  // namespace clusterkv::client::ctl
