#include "client/c/arguments.h"

#include "absl/strings/str_cat.h"

namespace clusterkv::client::c {

absl::Status CheckNotNull(const void* pointer, const char* name) {
  if (pointer != nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " is null"));
}

absl::Status CheckStructSize(const char* name, size_t given, size_t least, size_t most) {
  // Members go in eights: another size would cut one in two.
  if (given >= least && given <= most && given % 8 == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "struct_size of ", name, " is ", given, "; allowed: ", least, " to ", most,
      given > most
          ? " (the program was built for a later version than this library, " CLUSTERKV_VERSION ")"
          : " (structs begin as their _INIT macro)"));
}

absl::Status CheckSwitch(const char* name, uint32_t value) {
  if (value <= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, "; allowed: 0, 1"));
}

absl::Status CheckReserved(uint32_t value) {
  if (value == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("reserved is ", value, "; allowed: 0"));
}

absl::StatusOr<absl::Duration> ReadTimeout(const char* name, double seconds) {
  if (seconds >= 0) return absl::Seconds(seconds);  // "infinite" is bounded by Deadline
  return absl::InvalidArgumentError(absl::StrCat(name, " is ", seconds, "; allowed: at least 0"));
}

}  // namespace clusterkv::client::c
