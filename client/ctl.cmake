# clusterkvctl; all but main.cc is a library, for its tests.
set(CTL_DIR ${CMAKE_CURRENT_LIST_DIR}/ctl)
add_library(clusterkv_ctl STATIC
  ${CTL_DIR}/doctor/daemon.cc
  ${CTL_DIR}/doctor/doctor.cc
  ${CTL_DIR}/doctor/driver.cc
  ${CTL_DIR}/doctor/driver_probe.cc
  ${CTL_DIR}/doctor/gpu_sharing.cc
  ${CTL_DIR}/doctor/host_memory.cc
  ${CTL_DIR}/doctor/kernel.cc
  ${CTL_DIR}/doctor/machine.cc
  ${CTL_DIR}/doctor/memlock.cc
  ${CTL_DIR}/doctor/mounts.cc
  ${CTL_DIR}/doctor/mps.cc
  ${CTL_DIR}/doctor/numa.cc
  ${CTL_DIR}/doctor/sockets.cc
  ${CTL_DIR}/doctor/toolkit.cc
  ${CTL_DIR}/report.cc
  ${CTL_DIR}/status_json.cc
  ${CTL_DIR}/styled_line.cc
  ${CTL_DIR}/terminal_text.cc
  ${CTL_DIR}/top/rates.cc
  ${CTL_DIR}/top/screen.cc
  ${CTL_DIR}/top/top.cc
  ${CTL_DIR}/top/top_view.cc)
target_link_libraries(clusterkv_ctl
  PUBLIC clusterkv::client nlohmann_json::nlohmann_json
  PRIVATE clusterkv_warnings fmt::fmt ${CMAKE_DL_LIBS})

add_executable(clusterkvctl ${CTL_DIR}/main.cc)
target_compile_definitions(clusterkvctl PRIVATE CLUSTERKV_VERSION="${PROJECT_VERSION}")
target_link_libraries(clusterkvctl PRIVATE clusterkv_ctl clusterkv_warnings CLI11::CLI11)
