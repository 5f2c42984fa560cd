#pragma once

namespace clusterkv::service {

// The project's version, from CMakeLists.txt.
inline constexpr char kVersion[] = CLUSTERKV_VERSION;

}  // namespace clusterkv::service
