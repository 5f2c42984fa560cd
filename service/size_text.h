// Sizes, durations and id lists as people write them.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace clusterkv::service {

// "0", "4096", "30gb", "1.5GiB", "64 mb": units b, kb, mb, gb, tb, with or without i, all powers of
// 1024. Errors: INVALID_ARGUMENT that says what is allowed; also of 2^63 and more.
absl::StatusOr<uint64_t> ParseSize(const std::string& text);
// The largest unit that divides it: "64mb".
std::string SizeText(uint64_t bytes);

// "10s", "500ms", "1m30s". Errors: INVALID_ARGUMENT, also if negative or infinite.
absl::StatusOr<absl::Duration> ParseDuration(const std::string& text);

// "0,1000". Errors: INVALID_ARGUMENT.
absl::StatusOr<std::set<uint32_t>> ParseIdList(const std::string& text);

}  // namespace clusterkv::service
