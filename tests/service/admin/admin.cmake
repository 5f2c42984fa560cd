foreach(NAME config daemon_status log_limiter logging metrics recent_errors size_text slow_log
             status_json)
  clusterkv_add_test(${NAME}_test ${CMAKE_CURRENT_LIST_DIR}/${NAME}_test.cc)
  target_link_libraries(${NAME}_test PRIVATE clusterkv_admin nlohmann_json::nlohmann_json)
endforeach()

clusterkv_add_test(admin_server_test ${CMAKE_CURRENT_LIST_DIR}/admin_server_test.cc)
target_link_libraries(admin_server_test
  PRIVATE clusterkv_admin nlohmann_json::nlohmann_json PkgConfig::HTTPLIB)
