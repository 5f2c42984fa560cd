#include "service/recent_errors.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

namespace clusterkv::service {
namespace {

// Bytes that are no UTF-8 become U+FFFD: protobuf refuses a message with them.
std::string ValidUtf8(const std::string& text) {
  using Json = nlohmann::json;
  const std::string dumped = Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
  return Json::parse(dumped).get<std::string>();
}

}  // namespace

void RecentErrors::Add(std::string time, std::string level, const std::string& message,
                       std::string text) {
  const bool cut = text.size() > kMaxTextBytes;
  if (cut) text.resize(kMaxTextBytes);
  text = ValidUtf8(text);
  if (cut) text += " ...";
  RecentError added{.time = std::move(time), .level = std::move(level), .text = std::move(text)};
  const std::lock_guard lock(mu_);
  const auto same = std::ranges::find_if(entries_, [&](const Entry& entry) {
    return entry.error.level == added.level && entry.error.text == added.text;
  });
  if (same != entries_.end()) {
    added.count += same->error.count;
    entries_.erase(same);
  }
  if (std::ranges::count(entries_, message, &Entry::message) >=
      static_cast<ptrdiff_t>(kMaxOfOneMessage)) {
    entries_.erase(std::ranges::find(entries_, message, &Entry::message));
  }
  entries_.push_back({.message = message, .error = std::move(added)});
  if (entries_.size() > kCapacity) entries_.pop_front();
}

std::vector<RecentError> RecentErrors::List() const {
  const std::lock_guard lock(mu_);
  std::vector<RecentError> errors;
  for (const Entry& entry : entries_) errors.push_back(entry.error);
  return errors;
}

RecentErrors& DaemonErrors() {
  static RecentErrors errors;
  return errors;
}

}  // namespace clusterkv::service
