# clusterkv-bench; all but main.cc is a library, for its tests. What knows CUDA is built only with it.
set(BENCH_DIR ${CMAKE_CURRENT_LIST_DIR}/bench)
add_library(clusterkv_bench STATIC
  ${BENCH_DIR}/backend.cc
  ${BENCH_DIR}/batch_state.cc
  ${BENCH_DIR}/ceiling_bench.cc
  ${BENCH_DIR}/ceilings.cc
  ${BENCH_DIR}/cluster_bench.cc
  ${BENCH_DIR}/cores.cc
  ${BENCH_DIR}/decode_bench.cc
  ${BENCH_DIR}/fma_peak.cc
  ${BENCH_DIR}/forced_misses.cc
  ${BENCH_DIR}/gather_bench.cc
  ${BENCH_DIR}/host_backend.cc
  ${BENCH_DIR}/key_model.cc
  ${BENCH_DIR}/layer_bench.cc
  ${BENCH_DIR}/layer_work.cc
  ${BENCH_DIR}/full_kv_state.cc
  ${BENCH_DIR}/options.cc
  ${BENCH_DIR}/pinned_region.cc
  ${BENCH_DIR}/published_context.cc
  ${BENCH_DIR}/report.cc
  ${BENCH_DIR}/statistics.cc)
target_include_directories(clusterkv_bench PUBLIC ${PROJECT_SOURCE_DIR})
target_compile_definitions(clusterkv_bench PRIVATE CLUSTERKV_VERSION="${PROJECT_VERSION}")
target_link_libraries(clusterkv_bench
  PUBLIC clusterkv::gpu nlohmann_json::nlohmann_json fmt::fmt
  PRIVATE clusterkv_replay hwy::hwy CLI11::CLI11 clusterkv_warnings)

if(CLUSTERKV_CUDA)
  target_sources(clusterkv_bench PRIVATE
    ${BENCH_DIR}/cublas.cc
    ${BENCH_DIR}/cuda_backend.cc
    ${BENCH_DIR}/cuda_graph.cc
    ${BENCH_DIR}/cuda_model.cc)
  add_library(clusterkv_bench_kernels STATIC
    ${BENCH_DIR}/cache_kernels.cu
    ${BENCH_DIR}/model_kernels.cu)
  target_include_directories(clusterkv_bench_kernels PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(clusterkv_bench_kernels PUBLIC CUDA::cudart_static)
  target_compile_definitions(clusterkv_bench PRIVATE CLUSTERKV_CUDA)
  # cuBLAS is loaded when it is asked for: nothing links it.
  target_link_libraries(clusterkv_bench PRIVATE clusterkv_bench_kernels ${CMAKE_DL_LIBS})
endif()

# What connects is in the program, as with the replay.
add_executable(clusterkv-bench
  ${BENCH_DIR}/main.cc
  ${BENCH_DIR}/served_bench.cc)
target_link_libraries(clusterkv-bench
  PRIVATE clusterkv_bench clusterkv_replay clusterkv::client clusterkv_warnings)
