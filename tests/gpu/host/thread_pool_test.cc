#include "gpu/host/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace clusterkv::gpu::host {
namespace {

TEST(ThreadPool, CallsEachIndexOnce) {
  for (int threads : {1, 2, 7}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (size_t count : {0u, 1u, 2u, 3u, 1000u}) {
      std::vector<std::atomic<int>> calls(count);
      pool.ParallelFor(count, [&](size_t i) { ++calls[i]; });
      for (size_t i = 0; i < count; ++i) ASSERT_EQ(calls[i], 1) << i << " of " << count;
    }
  }
}

TEST(ThreadPool, OneThreadMeansTheCallers) {
  ThreadPool pool(1);
  pool.ParallelFor(100, [caller = std::this_thread::get_id()](size_t) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
  });
}

TEST(ThreadPool, UsesAllItsThreadsAtOnce) {
  ThreadPool pool(3);
  // Nobody passes before all three are inside: with fewer threads this would never end.
  std::latch inside(3);
  std::mutex mutex;
  std::set<std::thread::id> ids;
  pool.ParallelFor(3, [&](size_t) {
    inside.arrive_and_wait();
    const std::lock_guard lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(ids.size(), 3u);
}

TEST(ThreadPool, PlainWritesAreVisibleAfterTheLoop) {
  ThreadPool pool(4);
  for (int round = 0; round < 200; ++round) {
    std::vector<int> values(64, 0);
    pool.ParallelFor(64, [&](size_t i) { values[i] = round + static_cast<int>(i); });
    for (size_t i = 0; i < 64; ++i) ASSERT_EQ(values[i], round + static_cast<int>(i));
  }
}

TEST(ThreadPool, LoopsOfSeveralCallersShareTheThreads) {
  ThreadPool pool(3);
  std::atomic<size_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round) pool.ParallelFor(17, [&](size_t i) { sum += i; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 4u * 100u * (16u * 17u / 2));
}

TEST(ThreadPool, LoopWithinALoopEnds) {
  ThreadPool pool(2);
  std::atomic<int> calls{0};
  pool.ParallelFor(8, [&](size_t) { pool.ParallelFor(8, [&](size_t) { ++calls; }); });
  EXPECT_EQ(calls, 64);
}

}  // namespace
}  // namespace clusterkv::gpu::host
