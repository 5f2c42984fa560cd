// The method's parameters under the names of the contract: in the report's "preset" and in --set.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "gpu/method_options.h"
#include "nlohmann/json.hpp"

namespace clusterkv::client::replay {

// Sets one parameter; `assignment` is "key=value".
// Errors: INVALID_ARGUMENT naming the key and what is allowed. Ranges are Validate()'s business.
absl::Status SetPresetKey(const std::string& assignment, gpu::MethodOptions& method);

// {"sink_tokens": 16, ..., "cache_tokens": 0}
nlohmann::ordered_json PresetKeys(const gpu::MethodOptions& method);

}  // namespace clusterkv::client::replay
