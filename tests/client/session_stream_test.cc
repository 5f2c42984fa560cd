#include "client/session_stream.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <deque>
#include <future>
#include <mutex>
#include <vector>

namespace clusterkv::client {
namespace {

// The daemon's side of a stream. Shared, because the stream owns the call.
struct FakeStream {
  std::mutex mutex;
  std::condition_variable changed;
  // Guarded by mutex.
  std::deque<v1::SessionEvent> events;
  std::vector<v1::SessionRequest> requests;
  std::optional<absl::Status> end;
  bool writes_done = false;
  bool ends_after_writes = true;
  int cancels = 0;

  void Send(v1::SessionEvent event) {
    const std::lock_guard lock(mutex);
    events.push_back(std::move(event));
    changed.notify_all();
  }
  void End(absl::Status status) {
    const std::lock_guard lock(mutex);
    if (!end) end = std::move(status);
    changed.notify_all();
  }
};

class FakeCall final : public SessionCall {
 public:
  explicit FakeCall(std::shared_ptr<FakeStream> stream) : stream_(std::move(stream)) {}

  bool Write(const v1::SessionRequest& request) override {
    const std::lock_guard lock(stream_->mutex);
    stream_->requests.push_back(request);
    return true;
  }
  bool Read(v1::SessionEvent* event) override {
    std::unique_lock lock(stream_->mutex);
    stream_->changed.wait(lock, [this] { return !stream_->events.empty() || stream_->end; });
    if (stream_->events.empty()) return false;
    *event = stream_->events.front();
    stream_->events.pop_front();
    return true;
  }
  void WritesDone() override {
    {
      const std::lock_guard lock(stream_->mutex);
      stream_->writes_done = true;
      if (!stream_->ends_after_writes) return;
    }
    stream_->End(absl::OkStatus());
  }
  absl::Status Finish() override {
    const std::lock_guard lock(stream_->mutex);
    return *stream_->end;
  }
  void Cancel() override {
    {
      const std::lock_guard lock(stream_->mutex);
      ++stream_->cancels;
    }
    stream_->End(absl::CancelledError("cancelled"));
  }

 private:
  const std::shared_ptr<FakeStream> stream_;
};

class Listener final : public SessionListener {
 public:
  void OnEvent(const v1::SessionEvent& event) override {
    const std::lock_guard lock(mutex_);
    events_.push_back(event);
    changed_.notify_all();
  }
  void OnStreamEnded(const absl::Status& why) override { ended.set_value(why); }
  std::vector<v1::SessionEvent> WaitFor(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(30), [&] { return events_.size() >= count; });
    return events_;
  }

  std::promise<absl::Status> ended;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<v1::SessionEvent> events_;  // guarded by mutex_
};

class SessionStreamTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<SessionStream>> Open(absl::Duration timeout = absl::Seconds(30)) {
    v1::Hello hello;
    hello.set_client_name("test");
    return SessionStream::Open(std::make_unique<FakeCall>(daemon_), hello, listener_,
                               Deadline(timeout));
  }
  static v1::SessionEvent Welcome() {
    v1::SessionEvent event;
    event.set_boot_epoch(42);
    event.mutable_welcome()->set_session_id(3);
    return event;
  }

  Listener listener_;
  std::shared_ptr<FakeStream> daemon_ = std::make_shared<FakeStream>();
};

TEST_F(SessionStreamTest, SaysHelloAndTakesTheWelcome) {
  daemon_->Send(Welcome());
  const auto stream = Open();
  ASSERT_TRUE(stream.ok()) << stream.status();
  EXPECT_EQ((*stream)->welcome().session_id(), 3u);
  EXPECT_EQ((*stream)->boot_epoch(), 42u);
  ASSERT_EQ(daemon_->requests.size(), 1u);
  EXPECT_EQ(daemon_->requests[0].hello().client_name(), "test");
}

TEST_F(SessionStreamTest, PassesEventsOnInOrder) {
  daemon_->Send(Welcome());
  const auto stream = Open();
  ASSERT_TRUE(stream.ok());
  for (uint64_t i = 0; i < 3; ++i) {
    v1::SessionEvent event;
    event.mutable_credit_returned()->set_offset(i);
    daemon_->Send(event);
  }
  const auto events = listener_.WaitFor(3);
  ASSERT_EQ(events.size(), 3u);
  for (uint64_t i = 0; i < 3; ++i) EXPECT_EQ(events[i].credit_returned().offset(), i);
}

TEST_F(SessionStreamTest, ReportsTheDaemonsRefusal) {
  daemon_->End(absl::ResourceExhaustedError("64 sessions"));
  EXPECT_EQ(Open().status(), absl::ResourceExhaustedError("64 sessions"));
}

TEST_F(SessionStreamTest, GivesUpWithoutWelcome) {
  EXPECT_TRUE(absl::IsDeadlineExceeded(Open(absl::Milliseconds(20)).status()));
}

TEST_F(SessionStreamTest, RefusesAnotherFirstEvent) {
  v1::SessionEvent event;
  event.mutable_draining();
  daemon_->Send(event);
  EXPECT_TRUE(absl::IsInternal(Open().status()));
}

TEST_F(SessionStreamTest, TellsWhyItEnded) {
  daemon_->Send(Welcome());
  const auto stream = Open();
  ASSERT_TRUE(stream.ok());
  daemon_->End(absl::AbortedError("too slow"));
  EXPECT_EQ(listener_.ended.get_future().get(), absl::AbortedError("too slow"));
  EXPECT_TRUE((*stream)->WaitEnded(Deadline(absl::Seconds(30))));
}

TEST_F(SessionStreamTest, AnEndWithoutReasonIsUnavailable) {
  daemon_->Send(Welcome());
  const auto stream = Open();
  ASSERT_TRUE(stream.ok());
  daemon_->End(absl::OkStatus());
  EXPECT_TRUE(absl::IsUnavailable(listener_.ended.get_future().get()));
}

TEST_F(SessionStreamTest, CloseLetsTheDaemonEndIt) {
  daemon_->Send(Welcome());
  const auto stream = Open();
  ASSERT_TRUE(stream.ok());
  (*stream)->Close();
  EXPECT_TRUE(daemon_->writes_done);
  EXPECT_TRUE(daemon_->end->ok());
}

TEST_F(SessionStreamTest, CloseCancelsADaemonThatDoesNotAnswer) {
  daemon_->ends_after_writes = false;
  daemon_->Send(Welcome());
  const auto stream = Open();
  ASSERT_TRUE(stream.ok());
  (*stream)->Close();
  EXPECT_TRUE(absl::IsCancelled(*daemon_->end));
}

}  // namespace
}  // namespace clusterkv::client
