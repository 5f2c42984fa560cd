#include "service/task_queue.h"

#include <pthread.h>

#include <future>
#include <memory>
#include <utility>

namespace clusterkv::service {

TaskQueue::TaskQueue(const std::string& name, size_t capacity, std::chrono::microseconds poll)
    : capacity_(capacity), poll_(poll), thread_([this] { Run(); }) {
  pthread_setname_np(thread_.native_handle(), name.substr(0, 15).c_str());
}

TaskQueue::~TaskQueue() { Stop(); }

bool TaskQueue::TryPost(Task task) {
  {
    std::lock_guard lock(mu_);
    if (stopping_ || tasks_.size() >= capacity_) return false;
    Push(std::move(task));
  }
  wake_.notify_one();
  return true;
}

void TaskQueue::Post(Task task) {
  {
    std::lock_guard lock(mu_);
    if (stopping_) return;
    Push(std::move(task));
  }
  wake_.notify_one();
}

void TaskQueue::Drain() {
  // Shared: the thread may still be in set_value when the waiter has gone on.
  const auto reached = std::make_shared<std::promise<void>>();
  {
    std::lock_guard lock(mu_);
    if (stopping_) return;
    Push([reached] { reached->set_value(); });
  }
  wake_.notify_one();
  reached->get_future().wait();
}

void TaskQueue::Stop() {
  {
    std::lock_guard lock(mu_);
    stopping_ = true;
    news_.store(true, std::memory_order_relaxed);
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void TaskQueue::Push(Task task) {
  tasks_.push_back(std::move(task));
  news_.store(true, std::memory_order_relaxed);
}

size_t TaskQueue::depth() const {
  std::lock_guard lock(mu_);
  return tasks_.size();
}

void TaskQueue::Poll() const {
  const auto end = Clock::now() + poll_;
  while (!news_.load(std::memory_order_relaxed) && Clock::now() < end) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

TaskQueueLoad TaskQueue::load() const {
  const auto seconds = [](Clock::duration time) {
    return std::chrono::duration<double>(time).count();
  };
  std::lock_guard lock(mu_);
  TaskQueueLoad load{.waiting = tasks_.size(), .tasks = done_, .busy_seconds = seconds(busy_)};
  if (began_ != Clock::time_point{}) {
    load.task_age_seconds = seconds(Clock::now() - began_);
    load.busy_seconds += load.task_age_seconds;
  }
  return load;
}

void TaskQueue::Run() {
  std::unique_lock lock(mu_);
  while (true) {
    if (tasks_.empty() && !stopping_ && poll_.count() > 0) {
      news_.store(false, std::memory_order_relaxed);
      lock.unlock();
      Poll();
      lock.lock();
    }
    wake_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    const Clock::time_point began = Clock::now();
    began_ = began;
    lock.unlock();
    task();
    task = nullptr;  // what it holds is freed outside the lock
    lock.lock();
    busy_ += Clock::now() - began;
    began_ = {};
    ++done_;
  }
}

}  // namespace clusterkv::service
