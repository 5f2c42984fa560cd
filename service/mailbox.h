// Work for a thread that waits in epoll, from other threads.
#pragma once

#include <deque>
#include <functional>
#include <mutex>

#include "gpu/unique_fd.h"

namespace clusterkv::service {

// Thread-safe.
class Mailbox {
 public:
  Mailbox();

  void Post(std::function<void()> task);
  // On the thread that waits, once fd() is readable.
  void RunAll();

  int fd() const { return wake_.get(); }

 private:
  gpu::UniqueFd wake_;
  std::mutex mu_;
  std::deque<std::function<void()>> tasks_;  // guarded by mu_
};

}  // namespace clusterkv::service
