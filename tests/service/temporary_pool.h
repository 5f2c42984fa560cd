// A HostPool in a directory of its own that goes with it.
#pragma once

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

#include "service/host_account.h"
#include "service/host_pool.h"

namespace clusterkv::service {

class TemporaryDirectory {
 public:
  explicit TemporaryDirectory(const std::string& parent = testing::TempDir()) {
    std::string pattern = parent + "clusterkv-XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Files of this process may not grow beyond `bytes`.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(uint64_t bytes) {
    before_ = std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit_);
    rlimit lower = limit_;
    lower.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &lower);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &limit_);
    std::signal(SIGXFSZ, before_);
  }

 private:
  rlimit limit_{};
  void (*before_)(int) = nullptr;
};

class TemporaryPool {
 public:
  TemporaryPool(uint32_t chunks, uint64_t chunk_bytes, bool new_files = false) {
    auto pool = HostPool::Create({.directory = directory_.path(),
                                  .total_bytes = chunks * chunk_bytes,
                                  .chunk_bytes = chunk_bytes,
                                  .new_files = new_files});
    if (!pool.ok()) std::abort();
    pool_ = *std::move(pool);
    accounts_ = std::make_unique<HostAccounts>(*pool_, /*offered_bytes=*/0);
  }

  HostPool& operator*() const { return *pool_; }
  HostPool* operator->() const { return pool_.get(); }
  // All of the pool.
  HostAccount& account() const { return *accounts_->Find(kNoGrant); }
  // The pool alone; the directory stays.
  std::unique_ptr<HostPool> Take() { return std::move(pool_); }

 private:
  TemporaryDirectory directory_;
  std::unique_ptr<HostPool> pool_;
  std::unique_ptr<HostAccounts> accounts_;
};

}  // namespace clusterkv::service
