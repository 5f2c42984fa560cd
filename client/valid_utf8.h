// Text from elsewhere, made fit to be shown.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace clusterkv::client {

// One replacement character for each sequence of bytes that is no UTF-8, however long.
inline std::string ValidUtf8(const std::string& text) {
  using Json = nlohmann::json;
  return Json::parse(Json(text).dump(-1, ' ', false, Json::error_handler_t::replace))
      .get<std::string>();
}

}  // namespace clusterkv::client
