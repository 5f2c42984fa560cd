// The stream of the host backend: a real FIFO thread, so that asynchrony is exercised without a
// GPU. Semantics are Stream's.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/device.h"

namespace clusterkv::gpu::host {

class HostStream final : public Stream {
 public:
  using Work = std::function<absl::Status()>;

  // Entries that wait; one more is RESOURCE_EXHAUSTED. An event is an entry, too.
  static constexpr size_t kMaxQueued = 65'536;

  // `name` becomes the thread's, cut to 15 characters.
  static absl::StatusOr<std::unique_ptr<HostStream>> Create(const std::string& name);
  ~HostStream() override;

  // Appends a piece of work. It must not wait for this stream.
  absl::Status Enqueue(Work work);

  absl::Status CopyAsync(void* destination, const void* source, size_t bytes) override;
  absl::StatusOr<std::unique_ptr<Event>> Record() override;
  absl::Status Synchronize() override;

 private:
  struct Entry {
    Work work;
    bool always = false;  // runs even after a failure: events
  };

  HostStream() = default;
  absl::Status Push(Entry entry);
  void Run();

  std::mutex mutex_;
  std::condition_variable queued_;    // the thread waits: work or stop
  std::condition_variable finished_;  // Synchronize waits
  // Guarded by mutex_.
  std::deque<Entry> queue_;
  uint64_t pushed_ = 0;
  uint64_t completed_ = 0;
  absl::Status first_error_;
  bool stop_ = false;

  std::thread thread_;  // constant after Create
};

}  // namespace clusterkv::gpu::host
