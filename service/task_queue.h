// A named thread that runs tasks in order.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace clusterkv::service {

// What its thread does, for those who watch it.
struct TaskQueueLoad {
  size_t waiting = 0;           // tasks, the one that runs not among them
  uint64_t tasks = 0;           // done since the start
  double busy_seconds = 0;      // in tasks since the start, the one that runs among them
  double task_age_seconds = 0;  // of the one that runs; 0: idle
};

// Thread-safe. Destruction stops it.
class TaskQueue {
 public:
  using Task = std::function<void()>;

  // poll: how long the thread looks for its next task before it sleeps. A sleeper takes tens of
  // microseconds to wake, a poller takes a core.
  TaskQueue(const std::string& name, size_t capacity,
            std::chrono::microseconds poll = std::chrono::microseconds(0));
  ~TaskQueue();

  // False, and nothing is kept, if the queue is full or stopped: for work that comes from outside.
  bool TryPost(Task task);
  // For completions of work that was admitted before, so that their number is bounded already.
  // Dropped after Stop.
  void Post(Task task);
  // Waits until what was queued before has run; returns at once if stopped. Not on its own thread.
  void Drain();
  // Runs what is queued, then joins. Idempotent.
  void Stop();

  size_t depth() const;
  // Waits for no task.
  TaskQueueLoad load() const;

 private:
  using Clock = std::chrono::steady_clock;

  void Run();
  void Push(Task task);  // with mu_
  // Until there is a task, the queue stops, or the time to poll is over.
  void Poll() const;

  const size_t capacity_;
  const std::chrono::microseconds poll_;
  mutable std::mutex mu_;
  std::condition_variable wake_;    // with mu_
  std::deque<Task> tasks_;          // guarded by mu_
  bool stopping_ = false;           // guarded by mu_
  uint64_t done_ = 0;               // guarded by mu_
  Clock::duration busy_{};          // guarded by mu_; in tasks that are done
  Clock::time_point began_{};       // guarded by mu_; of the task that runs; 0: idle
  std::atomic<bool> news_ = false;  // tasks_ or stopping_ may have changed since the thread looked
  std::thread thread_;
};

}  // namespace clusterkv::service
