// A fixed pool of threads for data-parallel loops. The calling thread works too.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace clusterkv::gpu::host {

// Thread-safe: loops of several callers share the threads.
class ThreadPool {
 public:
  // threads >= 1; 1 means that callers do all the work themselves.
  explicit ThreadPool(int threads);
  ~ThreadPool();

  int threads() const { return threads_; }
  // Calls body(i) for every i in [0, count), in any order, and waits for all. No exceptions.
  void ParallelFor(size_t count, const std::function<void(size_t)>& body);

 private:
  struct Impl;
  const int threads_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::gpu::host
