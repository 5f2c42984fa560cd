# clusterkv-size: the arithmetic of admission for people.
add_executable(clusterkv-size
  ${CMAKE_CURRENT_LIST_DIR}/clusterkv_size.cc
  ${CMAKE_CURRENT_LIST_DIR}/size_options.cc
  ${CMAKE_CURRENT_LIST_DIR}/size_report.cc)
target_link_libraries(clusterkv-size
  PRIVATE clusterkv::service clusterkv_admin CLI11::CLI11 nlohmann_json::nlohmann_json
          clusterkv_warnings)
