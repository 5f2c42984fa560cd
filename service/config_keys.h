// The one table of configuration keys: flags, environment, YAML, help and the effective
// configuration are all made from it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/config.h"

namespace clusterkv::service {

// Before a key in the environment.
inline constexpr char kEnvironmentPrefix[] = "CLUSTERKV_";

struct ConfigKey {
  std::string name;  // kebab-case
  std::string type;
  std::string help;
  // Errors: INVALID_ARGUMENT that says what is allowed.
  std::function<absl::Status(Config&, const std::string&)> set;
  // As `set` would read it.
  std::function<std::string(const Config&)> get;
  // What a flag without a value says; empty: it needs one.
  std::string bare = {};
};

const std::vector<ConfigKey>& ConfigKeys();

// Errors: INVALID_ARGUMENT with the name as `written`, the nearest known key, and all known keys.
absl::StatusOr<const ConfigKey*> FindConfigKey(const std::string& name, const std::string& written);

}  // namespace clusterkv::service
