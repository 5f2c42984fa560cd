# The client library against a real daemon. Included by tests/client.
clusterkv_add_test(client_lifecycle_test
  ${CMAKE_CURRENT_LIST_DIR}/client_lifecycle_test.cc ${CMAKE_CURRENT_LIST_DIR}/dense_sequence.cc)
target_link_libraries(client_lifecycle_test PRIVATE clusterkv::client clusterkv_replay)
target_compile_definitions(client_lifecycle_test
  PRIVATE CLUSTERKVD_PATH="$<TARGET_FILE:clusterkvd>")
add_dependencies(client_lifecycle_test clusterkvd)
