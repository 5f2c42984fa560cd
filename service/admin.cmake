# Configuration, logs, and what the daemon tells of itself.
set(ADMIN_PAGE_SOURCE ${CMAKE_CURRENT_BINARY_DIR}/admin_page.cc)
clusterkv_embed_text(${ADMIN_PAGE_SOURCE} ${CMAKE_CURRENT_LIST_DIR}/admin_page.html
  service/admin_page.h clusterkv::service kAdminPage)

add_library(clusterkv_admin STATIC
  ${ADMIN_PAGE_SOURCE}
  ${CMAKE_CURRENT_LIST_DIR}/admin_server.cc
  ${CMAKE_CURRENT_LIST_DIR}/config.cc
  ${CMAKE_CURRENT_LIST_DIR}/config_help.cc
  ${CMAKE_CURRENT_LIST_DIR}/config_keys.cc
  ${CMAKE_CURRENT_LIST_DIR}/daemon_status.cc
  ${CMAKE_CURRENT_LIST_DIR}/grant_id.cc
  ${CMAKE_CURRENT_LIST_DIR}/log_limiter.cc
  ${CMAKE_CURRENT_LIST_DIR}/logging.cc
  ${CMAKE_CURRENT_LIST_DIR}/metric_families.cc
  ${CMAKE_CURRENT_LIST_DIR}/metrics.cc
  ${CMAKE_CURRENT_LIST_DIR}/metrics_cache.cc
  ${CMAKE_CURRENT_LIST_DIR}/metrics_clients.cc
  ${CMAKE_CURRENT_LIST_DIR}/metrics_work.cc
  ${CMAKE_CURRENT_LIST_DIR}/process_metrics.cc
  ${CMAKE_CURRENT_LIST_DIR}/recent_errors.cc
  ${CMAKE_CURRENT_LIST_DIR}/size_text.cc
  ${CMAKE_CURRENT_LIST_DIR}/slow_log.cc
  ${CMAKE_CURRENT_LIST_DIR}/status_history.cc
  ${CMAKE_CURRENT_LIST_DIR}/status_json.cc)
target_include_directories(clusterkv_admin PUBLIC ${PROJECT_SOURCE_DIR})
target_compile_definitions(clusterkv_admin PUBLIC CLUSTERKV_VERSION="${PROJECT_VERSION}")
target_link_libraries(clusterkv_admin
  PUBLIC clusterkv::gpu absl::status absl::statusor absl::strings absl::span absl::time fmt::fmt
  PRIVATE clusterkv_warnings yaml-cpp spdlog::spdlog prometheus-cpp::core PkgConfig::HTTPLIB
          nlohmann_json::nlohmann_json Threads::Threads)
