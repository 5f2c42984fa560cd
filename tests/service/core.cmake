# The service without gRPC. core_test runs a whole ServiceCore over the host device.
foreach(NAME audit_slot cluster_scheduler extent_allocator host_account host_pool numa_policy piece_table recall_audit
             ring_ranges session_memory task_queue)
  clusterkv_add_test(${NAME}_test ${CMAKE_CURRENT_LIST_DIR}/${NAME}_test.cc)
  target_link_libraries(${NAME}_test PRIVATE clusterkv::service)
endforeach()

clusterkv_add_test(core_test
  ${CMAKE_CURRENT_LIST_DIR}/core_audit_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_fixture.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_grant_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_kept_memory_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_sequence_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_life_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_serve_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_session_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_slow_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_status_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/size_plan_test.cc)
target_link_libraries(numa_policy_test PRIVATE PkgConfig::NUMA)
target_link_libraries(core_test PRIVATE clusterkv::service nlohmann_json::nlohmann_json)
