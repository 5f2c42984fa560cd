#include "gpu/host/host_stream.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::host {
namespace {

// Shared by the event and its entry in the queue: either may go first.
class Completion {
 public:
  void Set() {
    const std::lock_guard lock(mutex_);
    done_ = true;
    changed_.notify_all();
  }

  bool done() {
    const std::lock_guard lock(mutex_);
    return done_;
  }

  bool WaitUntil(std::chrono::steady_clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, deadline, [this] { return done_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;  // guarded by mutex_
};

class HostEvent final : public Event {
 public:
  explicit HostEvent(std::shared_ptr<Completion> completion) : completion_(std::move(completion)) {}

  bool done() const override { return completion_->done(); }

  absl::Status Wait(absl::Duration timeout) const override {
    // A year is for ever, and keeps the clock from overflowing.
    const auto bounded = std::min(timeout, absl::Hours(24 * 365));
    const auto deadline = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(bounded);
    if (completion_->WaitUntil(deadline)) return absl::OkStatus();
    return absl::DeadlineExceededError(
        absl::StrCat("event not reached within ", absl::FormatDuration(timeout)));
  }

 private:
  const std::shared_ptr<Completion> completion_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HostStream>> HostStream::Create(const std::string& name) {
  std::unique_ptr<HostStream> stream(new HostStream());
  try {
    stream->thread_ = std::thread([raw = stream.get()] { raw->Run(); });
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(
        absl::StrCat("thread of stream \"", name, "\": ", error.what()));
  }
  // The kernel takes 15 characters; a name is for people, so failing to set it is no error.
  pthread_setname_np(stream->thread_.native_handle(), name.substr(0, 15).c_str());
  return stream;
}

HostStream::~HostStream() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    queued_.notify_one();
  }
  thread_.join();
}

absl::Status HostStream::Enqueue(Work work) {
  return Push({.work = std::move(work), .always = false});
}

absl::Status HostStream::CopyAsync(void* destination, const void* source, size_t bytes) {
  if (bytes == 0) return absl::OkStatus();
  if (destination == nullptr || source == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("copy of ", bytes, " bytes with a null pointer"));
  }
  return Enqueue([=] {
    std::memmove(destination, source, bytes);
    return absl::OkStatus();
  });
}

absl::StatusOr<std::unique_ptr<Event>> HostStream::Record() {
  auto completion = std::make_shared<Completion>();
  CKV_RETURN_IF_ERROR(Push({.work =
                                [completion] {
                                  completion->Set();
                                  return absl::OkStatus();
                                },
                            .always = true}));
  return std::make_unique<HostEvent>(std::move(completion));
}

absl::Status HostStream::Synchronize() {
  std::unique_lock lock(mutex_);
  const uint64_t target = pushed_;
  finished_.wait(lock, [&] { return completed_ >= target; });
  return std::exchange(first_error_, absl::OkStatus());
}

absl::Status HostStream::Push(Entry entry) {
  const std::lock_guard lock(mutex_);
  if (queue_.size() >= kMaxQueued) {
    return absl::ResourceExhaustedError(
        absl::StrCat("stream queue is full: ", kMaxQueued, " entries wait"));
  }
  queue_.push_back(std::move(entry));
  ++pushed_;
  queued_.notify_one();
  return absl::OkStatus();
}

void HostStream::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    queued_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;  // stop comes after all that was enqueued
    Entry entry = std::move(queue_.front());
    queue_.pop_front();
    if (entry.always || first_error_.ok()) {
      lock.unlock();
      absl::Status status = entry.work();
      // What the work holds goes before Synchronize returns: it may refer to the caller's things.
      entry.work = nullptr;
      lock.lock();
      if (!status.ok() && first_error_.ok()) first_error_ = std::move(status);
    }
    ++completed_;
    finished_.notify_all();
  }
}

}  // namespace clusterkv::gpu::host
