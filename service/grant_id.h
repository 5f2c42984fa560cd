// A grant: a part of the host pool promised to one container, whose sockets are its own
// (device_plugin/). The id names it in logs, listings and on disk; it is no secret.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace clusterkv::service {

using GrantId = uint64_t;

constexpr GrantId kNoGrant = 0;  // of the daemon's own sockets

// 16 hexadecimal digits.
std::string GrantText(GrantId grant);
// Of exactly that form, and not kNoGrant.
std::optional<GrantId> ParseGrantText(const std::string& text);

}  // namespace clusterkv::service
