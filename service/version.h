#pragma once

namespace clusterkv::service {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace clusterkv::service
