// The method's parameters as the C interface has them: a preset, and what differs from it.
#pragma once

#include "absl/status/statusor.h"
#include "client/c/clusterkv.h"
#include "gpu/method_options.h"

namespace clusterkv::client::c {

// Null: preset "default". Errors: INVALID_ARGUMENT; ranges are Validate()'s business.
absl::StatusOr<gpu::MethodOptions> ReadMethod(const clusterkv_method_options* options);

// Every parameter, no preset.
clusterkv_method_options DescribeMethod(const gpu::MethodOptions& method);

}  // namespace clusterkv::client::c
