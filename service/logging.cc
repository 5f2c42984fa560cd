#include "service/logging.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "service/recent_errors.h"

namespace clusterkv::service {
namespace {

std::atomic<LogFormat> format{LogFormat::kText};

// spdlog does the locking, levels and writing; the line is ours, so that both formats have fields.
spdlog::logger& Logger() {
  static const std::shared_ptr<spdlog::logger> logger = [] {
    auto made = std::make_shared<spdlog::logger>("clusterkv",
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%v");
    made->flush_on(spdlog::level::debug);
    return made;
  }();
  return *logger;
}

spdlog::level::level_enum SpdlogLevel(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

nlohmann::ordered_json ToJson(const LogField::Value& value) {
  return std::visit([](const auto& held) { return nlohmann::ordered_json(held); }, value);
}

std::string Dump(const nlohmann::ordered_json& json) {
  // A message may hold whatever bytes a client sent. ASCII only: U+2028 and the like end a line for
  // some readers of logs.
  return json.dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace);
}

// Needs no quotes in `name=value`.
bool IsPlain(char c) { return c > ' ' && c < 0x7f && c != '"' && c != '\\' && c != '='; }

// A line break in a message must not look like another line of the log.
std::string OneLine(std::string message) {
  for (char& c : message) {
    if (std::iscntrl(static_cast<unsigned char>(c)) != 0) c = ' ';
  }
  return message;
}

void Log(LogLevel level, const std::string& message, LogFields fields) {
  spdlog::logger& logger = Logger();
  const bool kept = level == LogLevel::kWarning || level == LogLevel::kError;
  if (!kept && !logger.should_log(SpdlogLevel(level))) return;
  const std::string now =
      absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
  if (kept) DaemonErrors().Add(now, LogLevelName(level), message, LogText(message, fields));
  const std::string line = FormatLogLine(format.load(), now, level, message, fields);
  logger.log(SpdlogLevel(level), "{}", line);
}

}  // namespace

const char* LogLevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarning:
      return "warning";
    case LogLevel::kError:
      return "error";
  }
  return "error";
}

void InitLogging(LogFormat chosen, LogLevel level) {
  format.store(chosen);
  Logger().set_level(SpdlogLevel(level));
}

std::string FormatLogLine(LogFormat chosen, const std::string& timestamp, LogLevel level,
                          const std::string& message, LogFields fields) {
  if (chosen == LogFormat::kJson) {
    nlohmann::ordered_json line{
        {"ts", timestamp}, {"level", LogLevelName(level)}, {"msg", message}};
    for (const LogField& field : fields) line[field.name] = ToJson(field.value);
    return Dump(line);
  }
  return timestamp + " " + LogLevelName(level) + " " + LogText(message, fields);
}

std::string LogText(const std::string& message, LogFields fields) {
  std::string text = OneLine(message);
  for (const LogField& field : fields) {
    const auto* word = std::get_if<std::string>(&field.value);
    const bool plain = word != nullptr && !word->empty() && std::ranges::all_of(*word, IsPlain);
    text += std::string(" ") + field.name + "=" + (plain ? *word : Dump(ToJson(field.value)));
  }
  return text;
}

void LogDebug(const std::string& message, LogFields fields) {
  Log(LogLevel::kDebug, message, fields);
}
void LogInfo(const std::string& message, LogFields fields) {
  Log(LogLevel::kInfo, message, fields);
}
void LogWarning(const std::string& message, LogFields fields) {
  Log(LogLevel::kWarning, message, fields);
}
void LogError(const std::string& message, LogFields fields) {
  Log(LogLevel::kError, message, fields);
}

}  // namespace clusterkv::service
