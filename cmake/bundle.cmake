# `--target bundle`: a relocatable tree in the build directory's bundle/, with the tests that
# tests/gpu.sh runs where the cuda backend is built.
set(CLUSTERKV_BUNDLE_TESTS "")
if(CLUSTERKV_CUDA AND CLUSTERKV_BUILD_TESTS)
  set(CLUSTERKV_BUNDLE_TESTS
    c_graph_test cuda_conformance_test cuda_device_test cuda_graph_test kmeans_kernel_benchmark
    latch_litmus link_benchmark property_test)
endif()
# As installed, so also as bundled: CMake would pad the build's own with an empty element, which to the
# loader is the current directory.
set(CLUSTERKV_BUNDLE_TARGETS
  clusterkvd clusterkvctl clusterkv-replay clusterkv-bench clusterkv-size clusterkv_c)
set_target_properties(${CLUSTERKV_BUNDLE_TARGETS} PROPERTIES BUILD_WITH_INSTALL_RPATH ON)
add_custom_target(bundle
  COMMAND ${PROJECT_SOURCE_DIR}/deploy/bundle.sh ${CMAKE_BINARY_DIR} ${CMAKE_BINARY_DIR}/bundle
          ${CLUSTERKV_BUNDLE_TESTS}
  VERBATIM)
add_dependencies(bundle ${CLUSTERKV_BUNDLE_TARGETS} ${CLUSTERKV_BUNDLE_TESTS})
