# What `cmake --install` lays out, and the package that find_package(clusterkv) finds there.
include(CMakePackageConfigHelpers)

set(CLUSTERKV_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/clusterkv)

# Ours lie below one directory of their own, so that `client/client.h` can clash with nobody's.
set(CLUSTERKV_INCLUDE_DIR ${CMAKE_INSTALL_INCLUDEDIR}/clusterkv)

install(TARGETS clusterkvd clusterkvctl clusterkv-replay clusterkv-bench clusterkv-size
        RUNTIME)
install(TARGETS clusterkv_client clusterkv_gpu clusterkv_proto
        EXPORT clusterkvTargets ARCHIVE)
if(CLUSTERKV_CUDA)
  install(TARGETS clusterkv_gpu_cuda EXPORT clusterkvTargets ARCHIVE)
endif()
install(EXPORT clusterkvTargets NAMESPACE clusterkv:: DESTINATION ${CLUSTERKV_PACKAGE_DIR})
# By itself, since its users need none of what the others do.
install(TARGETS clusterkv_c EXPORT clusterkvCTargets LIBRARY)
install(EXPORT clusterkvCTargets NAMESPACE clusterkv:: DESTINATION ${CLUSTERKV_PACKAGE_DIR})

install(FILES client/c/clusterkv.h DESTINATION ${CLUSTERKV_INCLUDE_DIR})
install(FILES client/client.h DESTINATION ${CLUSTERKV_INCLUDE_DIR}/client)
# What client.h includes, all of it plain C++. Without gpu/host/ and gpu/cuda/: those are backends' insides.
install(DIRECTORY gpu/ DESTINATION ${CLUSTERKV_INCLUDE_DIR}/gpu
        FILES_MATCHING PATTERN "*.h" PATTERN host EXCLUDE PATTERN cuda EXCLUDE)
# For clients in other languages.
install(DIRECTORY proto/clusterkv DESTINATION ${CMAKE_INSTALL_DATADIR}/clusterkv/proto
        FILES_MATCHING PATTERN "*.proto")
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

# Relative to where it lies, so that the prefix may be moved.
file(RELATIVE_PATH CLUSTERKV_PC_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/clusterkv.pc.in ${CMAKE_CURRENT_BINARY_DIR}/clusterkv.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/clusterkv.pc
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

configure_package_config_file(cmake/clusterkvConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/clusterkvConfig.cmake
  INSTALL_DESTINATION ${CLUSTERKV_PACKAGE_DIR})
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/clusterkvConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/clusterkvConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/clusterkvConfigVersion.cmake
  DESTINATION ${CLUSTERKV_PACKAGE_DIR})
