# The cuda backend: plain C++ against the runtime, and kernels. Part of clusterkv_gpu, since the
# registry of backends is.
target_sources(clusterkv_gpu PRIVATE
  cuda/cuda_cluster_ops.cc
  cuda/cuda_decode_ops.cc
  cuda/cuda_device.cc
  cuda/cuda_driver.cc
  cuda/cuda_error.cc
  cuda/cuda_ipc_memory.cc
  cuda/cuda_memory.cc
  cuda/cuda_stream.cc)

add_library(clusterkv_gpu_cuda STATIC
  cuda/kernels/attend.cu
  cuda/kernels/cluster_kernels.cu
  cuda/kernels/decode_layer.cu
  cuda/kernels/fetch.cu
  cuda/kernels/kmeans_assign.cu
  cuda/kernels/kmeans_assign_resident.cu
  cuda/kernels/kmeans_finish.cu
  cuda/kernels/kmeans_group.cu
  cuda/kernels/kmeans_launch.cu
  cuda/kernels/kmeans_move.cu
  cuda/kernels/kmeans_prepare.cu
  cuda/kernels/kmeans_update.cu
  cuda/kernels/select.cu
  cuda/kernels/step_kernels.cu)
add_library(clusterkv::gpu_cuda ALIAS clusterkv_gpu_cuda)
set_target_properties(clusterkv_gpu_cuda PROPERTIES EXPORT_NAME gpu_cuda)
target_include_directories(clusterkv_gpu_cuda PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_options(clusterkv_gpu_cuda PRIVATE -lineinfo)
target_link_libraries(clusterkv_gpu_cuda PUBLIC CUDA::cudart_static)

target_compile_definitions(clusterkv_gpu PRIVATE CLUSTERKV_CUDA)
target_link_libraries(clusterkv_gpu PRIVATE clusterkv_gpu_cuda)
