// The edge of the C interface: C++ statuses and exceptions become codes, and their text is kept for
// clusterkv_last_error().
#pragma once

#include <exception>
#include <new>
#include <string_view>

#include "absl/status/status.h"
#include "client/c/clusterkv.h"

namespace clusterkv::client::c {

// Of this thread; never null, at most 1,023 bytes.
const char* LastError();
// Keeps the text, allocating nothing.
clusterkv_status Fail(clusterkv_status code, std::string_view message);
// The code of `status`; if that is not OK, its message is kept.
clusterkv_status ToCode(const absl::Status& status);

// Runs a call that returns absl::Status. What the standard library throws does not get out.
template <typename Call>
clusterkv_status Guarded(const Call& call) {
  try {
    return ToCode(call());
  } catch (const std::bad_alloc&) {
    return Fail(CLUSTERKV_RESOURCE_EXHAUSTED, "out of memory in this process");
  } catch (const std::exception& error) {
    return Fail(CLUSTERKV_INTERNAL, error.what());
  }
}

}  // namespace clusterkv::client::c
