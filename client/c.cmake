# libclusterkv: the C interface. Ours is inside; what the distribution packages stays shared.
add_library(clusterkv_c SHARED
  ${CMAKE_CURRENT_LIST_DIR}/c/arguments.cc
  ${CMAKE_CURRENT_LIST_DIR}/c/batch.cc
  ${CMAKE_CURRENT_LIST_DIR}/c/client.cc
  ${CMAKE_CURRENT_LIST_DIR}/c/last_error.cc
  ${CMAKE_CURRENT_LIST_DIR}/c/method.cc
  ${CMAKE_CURRENT_LIST_DIR}/c/sequence.cc
  ${CMAKE_CURRENT_LIST_DIR}/c/tensors.cc)
add_library(clusterkv::c ALIAS clusterkv_c)
set(EXPORT_MAP ${CMAKE_CURRENT_LIST_DIR}/c/clusterkv.map)
set_target_properties(clusterkv_c PROPERTIES
  EXPORT_NAME c
  OUTPUT_NAME clusterkv
  VERSION ${PROJECT_VERSION}
  SOVERSION 0
  CXX_VISIBILITY_PRESET hidden
  VISIBILITY_INLINES_HIDDEN ON
  LINK_DEPENDS ${EXPORT_MAP})
target_compile_definitions(clusterkv_c PRIVATE CLUSTERKV_PROJECT_VERSION="${PROJECT_VERSION}")
target_include_directories(clusterkv_c PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
# Never unloaded: threads, and callbacks of gRPC and CUDA, may be in it until the process ends.
target_link_options(clusterkv_c PRIVATE
  -Wl,--version-script=${EXPORT_MAP} -Wl,--no-undefined -Wl,-z,nodelete)
# Nothing of it is the users' to link.
target_link_libraries(clusterkv_c PRIVATE
  $<BUILD_INTERFACE:clusterkv_client> $<BUILD_INTERFACE:clusterkv_warnings>)
