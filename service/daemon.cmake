# gRPC, the attach socket, and the program.
add_library(clusterkv_rpc STATIC
  ${CMAKE_CURRENT_LIST_DIR}/attach_server.cc
  ${CMAKE_CURRENT_LIST_DIR}/mailbox.cc
  ${CMAKE_CURRENT_LIST_DIR}/packet_socket.cc
  ${CMAKE_CURRENT_LIST_DIR}/rpc/cluster_kv_service.cc
  ${CMAKE_CURRENT_LIST_DIR}/rpc/convert.cc
  ${CMAKE_CURRENT_LIST_DIR}/rpc/fetch_server.cc
  ${CMAKE_CURRENT_LIST_DIR}/rpc/grpc_server.cc
  ${CMAKE_CURRENT_LIST_DIR}/rpc/request_id.cc
  ${CMAKE_CURRENT_LIST_DIR}/rpc/rpc_counters.cc
  ${CMAKE_CURRENT_LIST_DIR}/rpc/session_reactor.cc
  ${CMAKE_CURRENT_LIST_DIR}/socket_lock.cc)
target_link_libraries(clusterkv_rpc
  PUBLIC clusterkv::service clusterkv::proto
  PRIVATE clusterkv_warnings ${GRPCPP_REFLECTION_LIBRARY})
# clusterkv.proto has a service and no message, so that nothing else keeps its descriptor in the
# program, and reflection could name the service but not describe it.
target_link_options(clusterkv_rpc INTERFACE
  "LINKER:--undefined=descriptor_table_clusterkv_2fv1_2fclusterkv_2eproto")

# The device plugin; grants without gRPC are tested by themselves.
add_library(clusterkv_grants STATIC
  ${CMAKE_CURRENT_LIST_DIR}/device_plugin/grant_store.cc
  ${CMAKE_CURRENT_LIST_DIR}/device_plugin/grants.cc)
target_link_libraries(clusterkv_grants
  PUBLIC clusterkv::service PRIVATE clusterkv_warnings nlohmann_json::nlohmann_json)

add_library(clusterkv_device_plugin STATIC
  ${CMAKE_CURRENT_LIST_DIR}/device_plugin/device_plugin.cc
  ${CMAKE_CURRENT_LIST_DIR}/device_plugin/kubelet.cc
  ${CMAKE_CURRENT_LIST_DIR}/device_plugin/plugin_service.cc
  ${CMAKE_CURRENT_LIST_DIR}/rpc/grant_servers.cc)
target_link_libraries(clusterkv_device_plugin
  PUBLIC clusterkv_grants clusterkv_rpc clusterkv_kubelet_proto PRIVATE clusterkv_warnings)

add_executable(clusterkvd
  ${CMAKE_CURRENT_LIST_DIR}/clusterkvd.cc
  ${CMAKE_CURRENT_LIST_DIR}/service_manager.cc)
target_link_libraries(clusterkvd PRIVATE clusterkv_device_plugin clusterkv_rpc clusterkv_admin clusterkv_warnings)
