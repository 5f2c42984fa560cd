# The C++ client library. gRPC is known to connection.cc and grpc_status.cc only.
add_library(clusterkv_client STATIC
  ${CMAKE_CURRENT_LIST_DIR}/address.cc
  ${CMAKE_CURRENT_LIST_DIR}/attach_client.cc
  ${CMAKE_CURRENT_LIST_DIR}/attach_socket.cc
  ${CMAKE_CURRENT_LIST_DIR}/fetch_calls.cc
  ${CMAKE_CURRENT_LIST_DIR}/fetch_socket.cc
  ${CMAKE_CURRENT_LIST_DIR}/audit_helper.cc
  ${CMAKE_CURRENT_LIST_DIR}/audit_ring.cc
  ${CMAKE_CURRENT_LIST_DIR}/batch_direct.cc
  ${CMAKE_CURRENT_LIST_DIR}/batch_served.cc
  ${CMAKE_CURRENT_LIST_DIR}/client.cc
  ${CMAKE_CURRENT_LIST_DIR}/client_session.cc
  ${CMAKE_CURRENT_LIST_DIR}/connection.cc
  ${CMAKE_CURRENT_LIST_DIR}/decode_step.cc
  ${CMAKE_CURRENT_LIST_DIR}/decode_tail.cc
  ${CMAKE_CURRENT_LIST_DIR}/grpc_status.cc
  ${CMAKE_CURRENT_LIST_DIR}/ingest_helper.cc
  ${CMAKE_CURRENT_LIST_DIR}/kv_packer.cc
  ${CMAKE_CURRENT_LIST_DIR}/lifeline.cc
  ${CMAKE_CURRENT_LIST_DIR}/prompt_progress.cc
  ${CMAKE_CURRENT_LIST_DIR}/ring_allocator.cc
  ${CMAKE_CURRENT_LIST_DIR}/ring_layout.cc
  ${CMAKE_CURRENT_LIST_DIR}/sequence_impl.cc
  ${CMAKE_CURRENT_LIST_DIR}/sequence_ingest.cc
  ${CMAKE_CURRENT_LIST_DIR}/session_stream.cc
  ${CMAKE_CURRENT_LIST_DIR}/step_audit.cc
  ${CMAKE_CURRENT_LIST_DIR}/wire_conversion.cc)
add_library(clusterkv::client ALIAS clusterkv_client)
set_target_properties(clusterkv_client PROPERTIES EXPORT_NAME client)
target_include_directories(clusterkv_client PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}> $<INSTALL_INTERFACE:include/clusterkv>)
target_link_libraries(clusterkv_client
  PUBLIC clusterkv::proto clusterkv::gpu absl::status absl::statusor absl::span absl::time
  PRIVATE $<BUILD_INTERFACE:clusterkv_warnings> absl::strings Threads::Threads)
