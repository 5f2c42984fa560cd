#include "service/size_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <string_view>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace clusterkv::service {
namespace {

constexpr uint64_t kLargest = (1ull << 63) - 1;

struct Unit {
  std::string_view name;
  int shift;
};
constexpr std::array<Unit, 5> kUnits{{{"b", 0}, {"kb", 10}, {"mb", 20}, {"gb", 30}, {"tb", 40}}};

}  // namespace

absl::StatusOr<uint64_t> ParseSize(const std::string& text) {
  const absl::Status bad = absl::InvalidArgumentError(
      fmt::format("'{}' is not a size; write bytes, or a number with b, kb, mb, gb or tb", text));
  const size_t digits = text.find_first_not_of("0123456789.");
  const std::string number = text.substr(0, digits);
  std::string unit(digits == std::string::npos ? 1 : 0, 'b');
  if (digits != std::string::npos) {
    for (const char c : text.substr(digits)) {
      if (c != ' ' || !unit.empty())
        unit += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
    if (unit.size() == 3 && unit[1] == 'i') unit.erase(1, 1);
    if (unit == "k" || unit == "m" || unit == "g" || unit == "t") unit.push_back('b');
  }
  const auto* const known = std::ranges::find(kUnits, unit, &Unit::name);
  if (known == kUnits.end()) return bad;
  uint64_t whole = 0;
  if (absl::SimpleAtoi(number, &whole)) {  // beyond 2^53 a double would lose bytes
    if (whole > kLargest >> known->shift) return bad;
    return whole << known->shift;
  }
  double value = 0;
  if (!absl::SimpleAtod(number, &value)) return bad;
  const double bytes = std::ldexp(value, known->shift);
  if (!(bytes <= static_cast<double>(kLargest >> 1)) || bytes != std::floor(bytes)) return bad;
  return static_cast<uint64_t>(bytes);
}

std::string SizeText(uint64_t bytes) {
  for (auto unit = kUnits.rbegin(); unit != kUnits.rend(); ++unit) {
    if (bytes > 0 && bytes % (1ull << unit->shift) == 0) {
      return fmt::format("{}{}", bytes >> unit->shift, unit->name);
    }
  }
  return "0";
}

absl::StatusOr<absl::Duration> ParseDuration(const std::string& text) {
  absl::Duration duration;
  if (!absl::ParseDuration(text, &duration) || duration < absl::ZeroDuration() ||
      duration == absl::InfiniteDuration()) {
    return absl::InvalidArgumentError(
        fmt::format("'{}' is not a duration; write 10s, 500ms or 1m30s", text));
  }
  return duration;
}

absl::StatusOr<std::set<uint32_t>> ParseIdList(const std::string& text) {
  std::set<uint32_t> ids;
  const std::vector<std::string> parts = absl::StrSplit(text, ',', absl::SkipWhitespace());
  for (const std::string& part : parts) {
    uint32_t id = 0;
    if (!absl::SimpleAtoi(part, &id)) {
      return absl::InvalidArgumentError(
          fmt::format("'{}' in '{}' is not a numeric id; write 0,1000", part, text));
    }
    ids.insert(id);
  }
  return ids;
}

}  // namespace clusterkv::service
