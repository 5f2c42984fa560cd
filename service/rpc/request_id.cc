#include "service/rpc/request_id.h"

#include <fmt/format.h>
#include <grpcpp/server_context.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/time/clock.h"
#include "service/log_limiter.h"
#include "service/logging.h"

namespace clusterkv::service {
namespace {

constexpr size_t kMaxBytes = 64;
constexpr uint32_t kBurst = 20;
constexpr absl::Duration kInterval = absl::Milliseconds(200);

bool MayStand(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == ':' ||
         c == '-';
}

// Unique in this process; its start tells processes apart.
std::string NewId() {
  static const int64_t start = absl::ToUnixMicros(absl::Now());
  static std::atomic<uint64_t> next{1};
  return fmt::format("d{:x}-{:x}", start, next++);
}

LogLevel LevelOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnimplemented:
      return LogLevel::kError;
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return LogLevel::kWarning;
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDeadlineExceeded:
      return LogLevel::kDebug;
    default:
      return LogLevel::kInfo;
  }
}

}  // namespace

absl::Status CheckRequestId(const std::string& id) {
  if (!id.empty() && id.size() <= kMaxBytes && std::ranges::all_of(id, MayStand)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      fmt::format("{} of {} bytes; allowed are 1 to {} letters, digits and . _ : -", kRequestIdKey,
                  id.size(), kMaxBytes));
}

absl::StatusOr<std::string> RequestId(const grpc::ServerContextBase& context) {
  const auto [first, last] = context.client_metadata().equal_range(kRequestIdKey);
  if (first == last) return NewId();
  if (std::next(first) != last) {
    return absl::InvalidArgumentError(fmt::format("{} is there twice", kRequestIdKey));
  }
  std::string id(first->second.data(), first->second.size());
  if (absl::Status bad = CheckRequestId(id); !bad.ok()) return bad;
  return id;
}

void LogFailedCall(const char* method, const std::string& request_id, const absl::Status& why) {
  static LogLimiter limiter(kBurst, kInterval);
  const auto left_out = limiter.Admit(absl::Now());
  if (!left_out) return;
  std::vector<LogField> fields = {{"method", method},
                                  {"code", absl::StatusCodeToString(why.code())},
                                  {"why", std::string(why.message())},
                                  {"request_id", request_id}};
  if (*left_out > 0) fields.emplace_back("left_out", *left_out);
  switch (LevelOf(why.code())) {
    case LogLevel::kError:
      return LogError("call failed", fields);
    case LogLevel::kWarning:
      return LogWarning("call failed", fields);
    case LogLevel::kInfo:
      return LogInfo("call failed", fields);
    case LogLevel::kDebug:
      return LogDebug("call failed", fields);
  }
}

}  // namespace clusterkv::service
