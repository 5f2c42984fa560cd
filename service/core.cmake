# The service without gRPC: sessions, sequences, memory, ingest, clustering, served fetch.
add_library(clusterkv_service STATIC
  ${CMAKE_CURRENT_LIST_DIR}/audit_slot.cc
  ${CMAKE_CURRENT_LIST_DIR}/cluster_batch.cc
  ${CMAKE_CURRENT_LIST_DIR}/cluster_scheduler.cc
  ${CMAKE_CURRENT_LIST_DIR}/core.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_audit.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_grants.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_ingest.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_memory.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_sequences.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_serve.cc
  ${CMAKE_CURRENT_LIST_DIR}/core_status.cc
  ${CMAKE_CURRENT_LIST_DIR}/device_watch.cc
  ${CMAKE_CURRENT_LIST_DIR}/extent_allocator.cc
  ${CMAKE_CURRENT_LIST_DIR}/host_account.cc
  ${CMAKE_CURRENT_LIST_DIR}/host_pool.cc
  ${CMAKE_CURRENT_LIST_DIR}/numa_policy.cc
  ${CMAKE_CURRENT_LIST_DIR}/piece_table.cc
  ${CMAKE_CURRENT_LIST_DIR}/recall_audit.cc
  ${CMAKE_CURRENT_LIST_DIR}/ring_ranges.cc
  ${CMAKE_CURRENT_LIST_DIR}/session_memory.cc
  ${CMAKE_CURRENT_LIST_DIR}/size_plan.cc
  ${CMAKE_CURRENT_LIST_DIR}/serve_tensors.cc
  ${CMAKE_CURRENT_LIST_DIR}/task_queue.cc)
add_library(clusterkv::service ALIAS clusterkv_service)
target_include_directories(clusterkv_service PUBLIC ${PROJECT_SOURCE_DIR})
target_link_libraries(clusterkv_service PUBLIC clusterkv::gpu clusterkv_admin fmt::fmt
                      PRIVATE clusterkv_warnings PkgConfig::NUMA)
