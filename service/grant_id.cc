#include "service/grant_id.h"

#include <fmt/format.h>

#include <charconv>

namespace clusterkv::service {

std::string GrantText(GrantId grant) { return fmt::format("{:016x}", grant); }

std::optional<GrantId> ParseGrantText(const std::string& text) {
  GrantId grant = kNoGrant;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, grant, 16);
  // The one spelling that GrantText has: no capitals, no missing zeros.
  if (error != std::errc() || stop != end || grant == kNoGrant || GrantText(grant) != text) {
    return std::nullopt;
  }
  return grant;
}

}  // namespace clusterkv::service
