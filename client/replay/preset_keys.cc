#include "client/replay/preset_keys.h"

#include <charconv>
#include <cstdint>
#include <optional>
#include <variant>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::replay {
namespace {

using gpu::MethodOptions;

struct PresetKey {
  const char* name;
  std::variant<uint32_t MethodOptions::*, bool MethodOptions::*, gpu::GroupRule MethodOptions::*>
      member;
};

// In the order of the contract.
const PresetKey kPresetKeys[] = {
    {"sink_tokens", &MethodOptions::sink_tokens},
    {"min_window", &MethodOptions::min_window_tokens},
    {"decode_segment_tokens", &MethodOptions::decode_segment_tokens},
    {"prompt_segment_tokens", &MethodOptions::prompt_segment_tokens},
    {"tokens_per_cluster", &MethodOptions::tokens_per_cluster},
    {"kmeans_iterations", &MethodOptions::kmeans_iterations},
    {"group", &MethodOptions::group},
    {"center_keys", &MethodOptions::center_keys},
    {"estimate", &MethodOptions::estimate},
    {"cache_tokens", &MethodOptions::cache_tokens},
};

absl::StatusOr<uint32_t> ParseNumber(const std::string& key, const std::string& text) {
  uint32_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error == std::errc() && stop == end) return value;
  return absl::InvalidArgumentError(
      absl::StrCat(key, " is \"", text, "\"; allowed: a whole number below 2^32"));
}

absl::StatusOr<bool> ParseSwitch(const std::string& key, const std::string& text) {
  if (text == "true" || text == "1") return true;
  if (text == "false" || text == "0") return false;
  return absl::InvalidArgumentError(
      absl::StrCat(key, " is \"", text, "\"; allowed: true, false, 1, 0"));
}

std::string KeyNames() {
  std::string names;
  for (const PresetKey& key : kPresetKeys) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", key.name);
  }
  return names;
}

}  // namespace

absl::Status SetPresetKey(const std::string& assignment, gpu::MethodOptions& method) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", assignment, "\" is not KEY=VALUE; keys: ", KeyNames()));
  }
  const std::string name = assignment.substr(0, equals);
  const std::string value = assignment.substr(equals + 1);
  for (const PresetKey& key : kPresetKeys) {
    if (name != key.name) continue;
    if (const auto* number = std::get_if<uint32_t MethodOptions::*>(&key.member)) {
      CKV_ASSIGN_OR_RETURN(method.**number, ParseNumber(name, value));
    } else if (const auto* toggle = std::get_if<bool MethodOptions::*>(&key.member)) {
      CKV_ASSIGN_OR_RETURN(method.**toggle, ParseSwitch(name, value));
    } else {
      CKV_ASSIGN_OR_RETURN(method.group, gpu::ParseGroupRule(value));
    }
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no preset key \"", name, "\"; allowed: ", KeyNames()));
}

nlohmann::ordered_json PresetKeys(const gpu::MethodOptions& method) {
  nlohmann::ordered_json keys;
  for (const PresetKey& key : kPresetKeys) {
    if (const auto* number = std::get_if<uint32_t MethodOptions::*>(&key.member)) {
      keys[key.name] = method.**number;
    } else if (const auto* toggle = std::get_if<bool MethodOptions::*>(&key.member)) {
      keys[key.name] = method.**toggle;
    } else {
      keys[key.name] = gpu::GroupRuleName(method.group);
    }
  }
  return keys;
}

}  // namespace clusterkv::client::replay
