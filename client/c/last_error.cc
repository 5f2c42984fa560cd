#include "client/c/last_error.h"

#include <cstring>

namespace clusterkv::client::c {
namespace {

constexpr size_t kMessageBytes = 1024;
// Without a constructor or a destructor: there from a thread's first to its last instruction.
thread_local char last_error[kMessageBytes];

static_assert(CLUSTERKV_INVALID_ARGUMENT == static_cast<int>(absl::StatusCode::kInvalidArgument));
static_assert(CLUSTERKV_RESOURCE_EXHAUSTED ==
              static_cast<int>(absl::StatusCode::kResourceExhausted));
static_assert(CLUSTERKV_UNAUTHENTICATED == static_cast<int>(absl::StatusCode::kUnauthenticated));

// A cut message ends before the character that would be cut in two (UTF-8).
size_t Fitting(std::string_view message) {
  if (message.size() < kMessageBytes) return message.size();
  size_t bytes = kMessageBytes - 1;
  while (bytes > 0 && (static_cast<unsigned char>(message[bytes]) & 0xC0) == 0x80) --bytes;
  return bytes;
}

}  // namespace

const char* LastError() { return last_error; }

clusterkv_status Fail(clusterkv_status code, std::string_view message) {
  const size_t bytes = Fitting(message);
  std::memcpy(last_error, message.data(), bytes);
  last_error[bytes] = '\0';
  return code;
}

clusterkv_status ToCode(const absl::Status& status) {
  if (status.ok()) return CLUSTERKV_OK;
  // code(), unlike raw_code(), is one of the canonical ones.
  return Fail(static_cast<clusterkv_status>(status.code()),
              {status.message().data(), status.message().size()});
}

}  // namespace clusterkv::client::c
