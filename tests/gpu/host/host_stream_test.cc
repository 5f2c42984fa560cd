#include "gpu/host/host_stream.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <future>
#include <thread>
#include <vector>

namespace clusterkv::gpu::host {
namespace {

std::unique_ptr<HostStream> NewStream() { return *HostStream::Create("test"); }

// Keeps the stream's thread busy until it is opened.
class Gate {
 public:
  explicit Gate(HostStream& stream) {
    EXPECT_TRUE(stream
                    .Enqueue([future = opened_.get_future().share()] {
                      future.wait();
                      return absl::OkStatus();
                    })
                    .ok());
  }
  void Open() { opened_.set_value(); }

 private:
  std::promise<void> opened_;
};

TEST(HostStream, RunsWorkInOrder) {
  const auto stream = NewStream();
  std::vector<int> order;
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(stream
                    ->Enqueue([&order, i] {
                      order.push_back(i);
                      return absl::OkStatus();
                    })
                    .ok());
  }
  EXPECT_TRUE(stream->Synchronize().ok());
  ASSERT_EQ(order.size(), 1000u);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(order[static_cast<size_t>(i)], i);
}

TEST(HostStream, ReturnsBeforeTheWorkIsDone) {
  const auto stream = NewStream();
  Gate gate(*stream);
  std::array<char, 4> source = {'a', 'b', 'c', 'd'};
  std::array<char, 4> destination = {};
  ASSERT_TRUE(stream->CopyAsync(destination.data(), source.data(), 4).ok());
  const auto event = stream->Record();
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_FALSE((*event)->done());
  EXPECT_EQ((*event)->Wait(absl::Milliseconds(1)).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ((*event)->Wait(absl::ZeroDuration()).code(), absl::StatusCode::kDeadlineExceeded);
  gate.Open();
  EXPECT_TRUE((*event)->Wait(absl::InfiniteDuration()).ok());
  EXPECT_TRUE((*event)->done());
  EXPECT_EQ(destination, source);
}

TEST(HostStream, KeepsFirstErrorUntilSynchronize) {
  const auto stream = NewStream();
  std::atomic<int> ran{0};
  ASSERT_TRUE(stream->Enqueue([] { return absl::InternalError("first"); }).ok());
  ASSERT_TRUE(stream
                  ->Enqueue([&] {
                    ++ran;
                    return absl::DataLossError("second");
                  })
                  .ok());
  const absl::Status status = stream->Synchronize();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(status.message(), "first");
  EXPECT_EQ(ran, 0) << "work after a failure is skipped";
  EXPECT_TRUE(stream->Synchronize().ok()) << "reported once";
}

TEST(HostStream, WorksAgainAfterAReportedError) {
  const auto stream = NewStream();
  ASSERT_TRUE(stream->Enqueue([] { return absl::InternalError("once"); }).ok());
  EXPECT_FALSE(stream->Synchronize().ok());
  int value = 0;
  const int source = 5;
  ASSERT_TRUE(stream->CopyAsync(&value, &source, sizeof(value)).ok());
  EXPECT_TRUE(stream->Synchronize().ok());
  EXPECT_EQ(value, 5);
}

TEST(HostStream, EventsAreReachedDespiteAFailure) {
  const auto stream = NewStream();
  ASSERT_TRUE(stream->Enqueue([] { return absl::InternalError("broken"); }).ok());
  const auto event = stream->Record();
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_TRUE((*event)->Wait(absl::Seconds(30)).ok());
  EXPECT_FALSE(stream->Synchronize().ok()) << "an event says nothing about success";
}

TEST(HostStream, FullQueueIsResourceExhausted) {
  const auto stream = NewStream();
  // The gate must have left the queue before the queue is counted.
  std::promise<void> started;
  std::promise<void> opened;
  ASSERT_TRUE(stream
                  ->Enqueue([&started, future = opened.get_future().share()] {
                    started.set_value();
                    future.wait();
                    return absl::OkStatus();
                  })
                  .ok());
  started.get_future().wait();
  std::atomic<size_t> ran{0};
  for (size_t i = 0; i < HostStream::kMaxQueued; ++i) {
    ASSERT_TRUE(stream
                    ->Enqueue([&] {
                      ++ran;
                      return absl::OkStatus();
                    })
                    .ok())
        << i;
  }
  EXPECT_EQ(stream->Enqueue([] { return absl::OkStatus(); }).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(stream->Record().status().code(), absl::StatusCode::kResourceExhausted);
  opened.set_value();
  EXPECT_TRUE(stream->Synchronize().ok()) << "a refusal is no error of the stream";
  EXPECT_EQ(ran, HostStream::kMaxQueued);
}

TEST(HostStream, DestructionWaitsForWhatIsEnqueued) {
  std::atomic<int> ran{0};
  {
    const auto stream = NewStream();
    for (int i = 0; i < 100; ++i) {
      ASSERT_TRUE(stream
                      ->Enqueue([&] {
                        ++ran;
                        return absl::OkStatus();
                      })
                      .ok());
    }
  }
  EXPECT_EQ(ran, 100);
}

TEST(HostStream, EventOutlivesItsStream) {
  std::unique_ptr<Event> event;
  {
    const auto stream = NewStream();
    event = *stream->Record();
  }
  EXPECT_TRUE(event->done());
}

TEST(HostStream, DropsAnUnwaitedEvent) {
  const auto stream = NewStream();
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(stream->Record().ok());
  EXPECT_TRUE(stream->Synchronize().ok());
}

TEST(HostStream, TakesWorkFromManyThreads) {
  const auto stream = NewStream();
  int sum = 0;  // touched by the stream's thread alone
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        EXPECT_TRUE(stream
                        ->Enqueue([&] {
                          ++sum;
                          return absl::OkStatus();
                        })
                        .ok());
        if (i % 100 == 0) {
          EXPECT_TRUE(stream->Synchronize().ok());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(stream->Synchronize().ok());
  EXPECT_EQ(sum, 2000);
}

TEST(HostStream, NamesItsThread) {
  const auto stream = *HostStream::Create("a-name-longer-than-fifteen");
  char name[16] = {};
  ASSERT_TRUE(stream
                  ->Enqueue([&] {
                    pthread_getname_np(pthread_self(), name, sizeof(name));
                    return absl::OkStatus();
                  })
                  .ok());
  ASSERT_TRUE(stream->Synchronize().ok());
  EXPECT_STREQ(name, "a-name-longer-t");
}

TEST(HostStream, NullCopyIsRefusedAndEmptyCopyIsNothing) {
  const auto stream = NewStream();
  char byte = 0;
  EXPECT_EQ(stream->CopyAsync(nullptr, &byte, 1).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(stream->CopyAsync(&byte, nullptr, 1).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(stream->CopyAsync(nullptr, nullptr, 0).ok());
}

}  // namespace
}  // namespace clusterkv::gpu::host
