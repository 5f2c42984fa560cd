# clusterkv-replay; all but main.cc is a library, for its tests.
set(REPLAY_DIR ${CMAKE_CURRENT_LIST_DIR}/replay)
set(REPLAY_PAGE_SOURCE ${CMAKE_CURRENT_BINARY_DIR}/replay_html_page.cc)
clusterkv_embed_text(${REPLAY_PAGE_SOURCE} ${REPLAY_DIR}/html_report.html
  client/replay/html_page.h clusterkv::client::replay kReportPage)

add_library(clusterkv_replay STATIC
  ${REPLAY_PAGE_SOURCE}
  ${REPLAY_DIR}/baselines.cc
  ${REPLAY_DIR}/child_process.cc
  ${REPLAY_DIR}/device_trace.cc
  ${REPLAY_DIR}/dump.cc
  ${REPLAY_DIR}/evaluation.cc
  ${REPLAY_DIR}/html_report.cc
  ${REPLAY_DIR}/interrupt.cc
  ${REPLAY_DIR}/measures.cc
  ${REPLAY_DIR}/options.cc
  ${REPLAY_DIR}/output_file.cc
  ${REPLAY_DIR}/preset_keys.cc
  ${REPLAY_DIR}/private_daemon.cc
  ${REPLAY_DIR}/progress.cc
  ${REPLAY_DIR}/ranking.cc
  ${REPLAY_DIR}/report.cc
  ${REPLAY_DIR}/safetensors.cc
  ${REPLAY_DIR}/scratch_directory.cc
  ${REPLAY_DIR}/service_run.cc
  ${REPLAY_DIR}/service_totals.cc
  ${REPLAY_DIR}/step_attention.cc
  ${REPLAY_DIR}/step_range.cc
  ${REPLAY_DIR}/svg_chart.cc
  ${REPLAY_DIR}/trace.cc)
target_include_directories(clusterkv_replay PUBLIC ${PROJECT_SOURCE_DIR})
target_compile_definitions(clusterkv_replay PRIVATE CLUSTERKV_VERSION="${PROJECT_VERSION}")
# Of the client only its interface: what connects is in the program.
target_link_libraries(clusterkv_replay
  PUBLIC clusterkv::gpu nlohmann_json::nlohmann_json fmt::fmt
  PRIVATE CLI11::CLI11 clusterkv_warnings)

add_executable(clusterkv-replay
  ${REPLAY_DIR}/main.cc
  ${REPLAY_DIR}/worker.cc
  ${REPLAY_DIR}/worker_processes.cc)
target_link_libraries(clusterkv-replay PRIVATE clusterkv_replay clusterkv::client clusterkv_warnings)
