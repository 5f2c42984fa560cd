// Structured logs on stderr: a message, and fields by name. Thread-safe.
//
//   text  2026-11-24T23:44:30.123Z info  sequence registered session=3 sequence=17
//   json  {"ts":"2026-11-24T23:44:30.123Z","level":"info","msg":"sequence registered",
//          "session":3,"sequence":17}
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>

#include "absl/types/span.h"

namespace clusterkv::service {

enum class LogFormat { kText, kJson };
enum class LogLevel { kDebug, kInfo, kWarning, kError };

// "debug", "info", "warning", "error".
const char* LogLevelName(LogLevel level);

struct LogField {
  using Value = std::variant<uint64_t, int64_t, double, bool, std::string>;

  LogField(const char* field, const char* text) : name(field), value(std::string(text)) {}
  LogField(const char* field, std::string text) : name(field), value(std::move(text)) {}
  LogField(const char* field, bool flag) : name(field), value(flag) {}
  LogField(const char* field, std::floating_point auto number)
      : name(field), value(static_cast<double>(number)) {}
  LogField(const char* field, std::unsigned_integral auto number)
      : name(field), value(static_cast<uint64_t>(number)) {}
  LogField(const char* field, std::signed_integral auto number)
      : name(field), value(static_cast<int64_t>(number)) {}

  const char* name;
  Value value;
};

using LogFields = absl::Span<const LogField>;

// Until then: text, from info on.
void InitLogging(LogFormat format, LogLevel level);

void LogDebug(const std::string& message, LogFields fields = {});
void LogInfo(const std::string& message, LogFields fields = {});
void LogWarning(const std::string& message, LogFields fields = {});
void LogError(const std::string& message, LogFields fields = {});

// Warnings and errors are also kept, whatever the log's own level (service/recent_errors.h).

// One line of the log, without its line break.
std::string FormatLogLine(LogFormat format, const std::string& timestamp, LogLevel level,
                          const std::string& message, LogFields fields);
// What follows the level in a line of text: the message, then `name=value` of each field.
std::string LogText(const std::string& message, LogFields fields);

}  // namespace clusterkv::service
