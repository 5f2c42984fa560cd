#include "service/task_queue.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace clusterkv::service {
namespace {

// Holds the queue's thread inside a task until it is told to go on.
class Roadblock {
 public:
  explicit Roadblock(TaskQueue& queue) {
    queue.Post([this] {
      entered_.set_value();
      open_.get_future().wait();
    });
    entered_.get_future().wait();
  }
  void Open() { open_.set_value(); }

 private:
  std::promise<void> entered_, open_;
};

TEST(TaskQueue, RunsTasksInOrderOnItsThread) {
  TaskQueue queue("order", 1000);
  std::vector<int> seen;
  std::thread::id thread;
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(queue.TryPost([&seen, i] { seen.push_back(i); }));
  queue.Post([&thread] { thread = std::this_thread::get_id(); });
  queue.Stop();
  ASSERT_EQ(seen.size(), 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(seen[static_cast<size_t>(i)], i);
  EXPECT_NE(thread, std::this_thread::get_id());
}

TEST(TaskQueue, ThreadCarriesItsName) {
  TaskQueue queue("a-name-longer-than-the-kernel-takes", 1);
  std::string name(16, '\0');
  // Named by its maker, once it runs: a task that was posted later sees it.
  queue.Post([&name] { pthread_getname_np(pthread_self(), name.data(), name.size()); });
  queue.Stop();
  EXPECT_STREQ(name.c_str(), "a-name-longer-t");
}

TEST(TaskQueue, FullQueueRefusesTryPostButNotPost) {
  TaskQueue queue("full", 2);
  Roadblock block(queue);
  int ran = 0;
  EXPECT_TRUE(queue.TryPost([&ran] { ++ran; }));
  EXPECT_TRUE(queue.TryPost([&ran] { ++ran; }));
  EXPECT_FALSE(queue.TryPost([&ran] { ran += 100; }));
  queue.Post([&ran] { ++ran; });
  EXPECT_EQ(queue.depth(), 3u);
  block.Open();
  queue.Stop();
  EXPECT_EQ(ran, 3);
  EXPECT_EQ(queue.depth(), 0u);
}

TEST(TaskQueue, StopRunsWhatIsQueuedAndRefusesTheRest) {
  TaskQueue queue("stop", 10);
  Roadblock block(queue);
  std::atomic<int> ran = 0;
  for (int i = 0; i < 5; ++i) queue.Post([&ran] { ++ran; });
  std::thread stopper([&queue] { queue.Stop(); });
  block.Open();
  stopper.join();
  EXPECT_EQ(ran, 5);
  EXPECT_FALSE(queue.TryPost([&ran] { ++ran; }));
  queue.Post([&ran] { ++ran; });
  queue.Stop();
  EXPECT_EQ(ran, 5);
}

TEST(TaskQueue, TellsWhatItsThreadDoes) {
  TaskQueue queue("load", 10);
  EXPECT_EQ(queue.load().tasks, 0u);
  EXPECT_EQ(queue.load().task_age_seconds, 0);
  Roadblock block(queue);
  queue.Post([] {});
  const TaskQueueLoad stuck = queue.load();
  EXPECT_EQ(stuck.waiting, 1u);
  EXPECT_EQ(stuck.tasks, 0u);
  EXPECT_GT(stuck.task_age_seconds, 0);
  EXPECT_GT(queue.load().task_age_seconds, stuck.task_age_seconds) << "it goes on growing";
  EXPECT_GE(queue.load().busy_seconds, stuck.task_age_seconds) << "the task that runs counts";
  block.Open();
  queue.Stop();
  const TaskQueueLoad idle = queue.load();
  EXPECT_EQ(idle.waiting, 0u);
  EXPECT_EQ(idle.tasks, 2u);
  EXPECT_EQ(idle.task_age_seconds, 0);
  EXPECT_GT(idle.busy_seconds, stuck.task_age_seconds);
  EXPECT_EQ(queue.load().busy_seconds, idle.busy_seconds);
}

TEST(TaskQueue, FreesWhatATaskHoldsBeforeTheNextRuns) {
  TaskQueue queue("frees", 10);
  auto held = std::make_shared<int>(1);
  std::weak_ptr<int> watch = held;
  bool gone = false;
  queue.Post([held = std::move(held)] {});
  queue.Post([&] { gone = watch.expired(); });
  queue.Stop();
  EXPECT_TRUE(gone);
}

TEST(TaskQueue, ATaskMayPostToItsOwnQueue) {
  TaskQueue queue("own", 10);
  std::promise<void> done;
  queue.Post([&] { queue.Post([&] { done.set_value(); }); });
  done.get_future().wait();
  queue.Stop();
}

TEST(TaskQueue, DrainWaitsForWhatWasQueuedBefore) {
  TaskQueue queue("drain", 10);
  Roadblock block(queue);
  std::atomic<bool> ran = false;
  queue.Post([&ran] { ran = true; });
  std::thread opener([&block] { block.Open(); });
  queue.Drain();
  EXPECT_TRUE(ran);
  opener.join();
}

TEST(TaskQueue, DrainOfAStoppedQueueReturns) {
  TaskQueue queue("drained", 10);
  queue.Stop();
  queue.Drain();
}

TEST(TaskQueue, TakesTasksFromManyThreads) {
  TaskQueue queue("many", 100'000);
  constexpr int kThreads = 4, kTasks = 2000;
  int ran = 0;  // the queue's thread alone writes it
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kTasks; ++i) queue.Post([&ran] { ++ran; });
    });
  }
  for (std::thread& thread : threads) thread.join();
  queue.Stop();
  EXPECT_EQ(ran, kThreads * kTasks);
}

TEST(TaskQueue, PollsBetweenTasksAndSleepsAfterwards) {
  TaskQueue queue("poll", 10, std::chrono::milliseconds(20));
  std::atomic<int> ran = 0;
  for (int i = 0; i < 50; ++i) {
    // Some find it polling, some asleep.
    if (i % 10 == 9) std::this_thread::sleep_for(std::chrono::milliseconds(40));
    std::promise<void> done;
    ASSERT_TRUE(queue.TryPost([&] {
      ++ran;
      done.set_value();
    }));
    done.get_future().wait();
  }
  EXPECT_EQ(ran, 50);
  queue.Post([&ran] { ++ran; });
  queue.Drain();
  EXPECT_EQ(ran, 51);
  queue.Stop();  // while it polls
  EXPECT_FALSE(queue.TryPost([] {}));
}

// CPU time that the queue's thread takes in the 100 ms after a task.
double SecondsOfPolling(std::chrono::microseconds poll) {
  TaskQueue queue("poll", 10, poll);
  clockid_t clock = 0;
  std::promise<void> ran;
  queue.Post([&] {
    pthread_getcpuclockid(pthread_self(), &clock);
    ran.set_value();
  });
  ran.get_future().wait();
  const auto now = [&clock] {
    timespec time = {};
    clock_gettime(clock, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double before = now();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  return now() - before;
}

TEST(TaskQueue, TakesItsCoreForAsLongAsItPolls) {
  EXPECT_LT(SecondsOfPolling(std::chrono::microseconds(0)), 0.005);
  EXPECT_LT(SecondsOfPolling(std::chrono::microseconds(200)), 0.005);
  EXPECT_GT(SecondsOfPolling(std::chrono::seconds(1)), 0.01);  // also on a machine that is busy
}

}  // namespace
}  // namespace clusterkv::service
