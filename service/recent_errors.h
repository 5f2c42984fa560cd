// The newest warnings and errors of the log, for whoever looks at the daemon and not at its log.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

namespace clusterkv::service {

struct RecentError {
  std::string time;  // of the newest, RFC 3339, UTC
  std::string level;
  std::string text;    // message and fields, one line of UTF-8
  uint64_t count = 1;  // how often it came, word for word
};

// Thread-safe. Holds what the log holds: names that clients gave, and no secrets.
class RecentErrors {
 public:
  static constexpr size_t kCapacity = 50;
  static constexpr size_t kMaxOfOneMessage = 10;
  static constexpr size_t kMaxTextBytes = 1024;

  // `text` is the message with its fields. One that is there already moves to the end and counts
  // up; of one message only the newest stay: what is repeated does not push out what is rare.
  void Add(std::string time, std::string level, const std::string& message, std::string text);
  // Oldest first.
  std::vector<RecentError> List() const;

 private:
  struct Entry {
    std::string message;
    RecentError error;
  };

  mutable std::mutex mu_;
  std::deque<Entry> entries_;  // guarded by mu_
};

// Those of this process; the log adds to them.
RecentErrors& DaemonErrors();

}  // namespace clusterkv::service
