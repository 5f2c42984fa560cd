#include "service/slow_log.h"

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "absl/time/clock.h"

namespace clusterkv::service {
namespace {

constexpr uint32_t kBurst = 5;
constexpr absl::Duration kInterval = absl::Seconds(1);
constexpr std::array<const char*, SlowLog::kOperations> kNames = {"FetchClusters", "IngestTokens",
                                                                  "clustering", "session end"};

// Microseconds are fine enough for a reader.
double Rounded(double milliseconds) { return std::round(milliseconds * 1000) / 1000; }

}  // namespace

OperationTrace::OperationTrace(std::string request_id)
    : request_id_(std::move(request_id)), since_(std::chrono::steady_clock::now()) {}

double OperationTrace::End(const char* name) {
  const auto now = std::chrono::steady_clock::now();
  const double milliseconds = std::chrono::duration<double, std::milli>(now - since_).count();
  since_ = now;
  total_milliseconds_ += milliseconds;
  if (count_ < phases_.size()) phases_[count_++] = {.name = name, .milliseconds = milliseconds};
  return milliseconds / 1000;
}

SlowLog::SlowLog(absl::Duration threshold)
    : threshold_milliseconds_(threshold == absl::ZeroDuration()
                                  ? std::numeric_limits<double>::infinity()
                                  : absl::ToDoubleMilliseconds(threshold)),
      limiters_{
          {{kBurst, kInterval}, {kBurst, kInterval}, {kBurst, kInterval}, {kBurst, kInterval}}} {}

void SlowLog::Report(Operation operation, const OperationTrace& trace, LogFields fields) {
  if (trace.total_milliseconds_ < threshold_milliseconds_) return;
  const auto left_out = limiters_[operation].Admit(absl::Now());
  if (!left_out) return;
  std::vector<LogField> all = {{"operation", kNames[operation]},
                               {"total_ms", Rounded(trace.total_milliseconds_)}};
  for (size_t i = 0; i < trace.count_; ++i) {
    all.emplace_back(trace.phases_[i].name, Rounded(trace.phases_[i].milliseconds));
  }
  all.insert(all.end(), fields.begin(), fields.end());
  if (!trace.request_id_.empty()) all.emplace_back("request_id", trace.request_id_);
  if (*left_out > 0) all.emplace_back("left_out", *left_out);
  LogWarning("slow operation", all);
}

}  // namespace clusterkv::service
