# Grants, without gRPC; tests/integration/test_device_plugin.py plays the kubelet.
clusterkv_add_test(grant_store_test ${CMAKE_CURRENT_LIST_DIR}/device_plugin/grant_store_test.cc)
target_link_libraries(grant_store_test PRIVATE clusterkv_grants)

clusterkv_add_test(grants_test
  ${CMAKE_CURRENT_LIST_DIR}/core_fixture.cc
  ${CMAKE_CURRENT_LIST_DIR}/device_plugin/grants_test.cc)
target_link_libraries(grants_test PRIVATE clusterkv_grants)
