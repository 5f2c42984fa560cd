// The command line of clusterkv-size.
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "service/size_plan.h"

namespace clusterkv::service {

struct SizeOptions {
  SizeQuestion question;
  std::string preset;
  bool json = false;
};

// nullopt: the help or the version was asked for and printed.
// Errors: INVALID_ARGUMENT naming the option and what is allowed.
absl::StatusOr<std::optional<SizeOptions>> ParseSizeOptions(int argc, const char* const* argv);

}  // namespace clusterkv::service
