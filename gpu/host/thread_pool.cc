#include "gpu/host/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace clusterkv::gpu::host {
namespace {

// One ParallelFor; lives on its caller's stack until no worker is in it.
struct Loop {
  const std::function<void(size_t)>* body;
  size_t count;
  std::atomic<size_t> next{0};
  int workers = 0;  // inside; guarded by the pool's mutex

  bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }

  void Work() {
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) (*body)(i);
  }
};

}  // namespace

struct ThreadPool::Impl {
  std::mutex mutex;
  std::condition_variable offered;  // threads wait for a loop or stop
  std::condition_variable left;     // callers wait for workers to leave their loop
  // Guarded by mutex.
  std::vector<Loop*> loops;
  bool stop = false;

  std::vector<std::thread> threads;  // constant after construction

  Loop* FindLoop() const {
    for (Loop* loop : loops) {
      if (!loop->exhausted()) return loop;
    }
    return nullptr;
  }

  void Run() {
    std::unique_lock lock(mutex);
    while (true) {
      Loop* loop = nullptr;
      offered.wait(lock, [&] { return stop || (loop = FindLoop()) != nullptr; });
      if (stop) return;
      ++loop->workers;
      lock.unlock();
      loop->Work();
      lock.lock();
      if (--loop->workers == 0) left.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int threads)
    : threads_(std::max(threads, 1)), impl_(std::make_unique<Impl>()) {
  for (int i = 1; i < threads_; ++i) {
    impl_->threads.emplace_back([this] { impl_->Run(); });
    const std::string name = "ckv-pool-" + std::to_string(i);
    pthread_setname_np(impl_->threads.back().native_handle(), name.substr(0, 15).c_str());
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stop = true;
    impl_->offered.notify_all();
  }
  for (std::thread& thread : impl_->threads) thread.join();
}

void ThreadPool::ParallelFor(size_t count, const std::function<void(size_t)>& body) {
  if (threads_ == 1 || count <= 1) {
    for (size_t i = 0; i < count; ++i) body(i);
    return;
  }
  Loop loop{.body = &body, .count = count};
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->loops.push_back(&loop);
    const size_t useful = std::min(count - 1, impl_->threads.size());
    for (size_t i = 0; i < useful; ++i) impl_->offered.notify_one();
  }
  loop.Work();
  std::unique_lock lock(impl_->mutex);
  std::erase(impl_->loops, &loop);
  impl_->left.wait(lock, [&] { return loop.workers == 0; });
}

}  // namespace clusterkv::gpu::host
