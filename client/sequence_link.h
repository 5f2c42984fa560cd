// What the daemon has said about one sequence: written by the session's threads, read by all.
#pragma once

#include <cstdint>
#include <mutex>

#include "absl/status/status.h"
#include "client/client.h"

namespace clusterkv::client {

// Thread-safe.
class SequenceLink {
 public:
  SequenceLink(uint64_t id, uint32_t cut) : id_(id), published_{.segments = 0, .cut = cut} {}

  uint64_t id() const { return id_; }

  Published published() const {
    const std::lock_guard lock(mutex_);
    return published_;
  }
  // Words of the daemon may overtake each other (event and reply): the newest stays.
  void Publish(const Published& published) {
    const std::lock_guard lock(mutex_);
    if (published.segments > published_.segments) published_ = published;
  }

  absl::Status failure() const {
    const std::lock_guard lock(mutex_);
    return failure_;
  }
  // The first reason stays.
  void Fail(const absl::Status& why) {
    const std::lock_guard lock(mutex_);
    if (failure_.ok()) failure_ = why;
  }

 private:
  const uint64_t id_;
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  Published published_;
  absl::Status failure_;
};

}  // namespace clusterkv::client
