add_library(clusterkv_ctl_report STATIC ${CMAKE_CURRENT_LIST_DIR}/ctl/report.cc)
target_link_libraries(clusterkv_ctl_report
  PUBLIC clusterkv::client PRIVATE clusterkv_warnings fmt::fmt nlohmann_json::nlohmann_json)

add_executable(clusterkvctl ${CMAKE_CURRENT_LIST_DIR}/ctl/main.cc)
target_compile_definitions(clusterkvctl PRIVATE CLUSTERKV_VERSION="${PROJECT_VERSION}")
target_link_libraries(clusterkvctl PRIVATE clusterkv_ctl_report clusterkv_warnings CLI11::CLI11)
