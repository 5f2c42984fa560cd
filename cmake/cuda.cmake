# The CUDA language, for kernels only; everything else is plain C++ against the static runtime, and
# nothing links the driver: programs start on machines without one.
set(CMAKE_CUDA_ARCHITECTURES OFF)  # -gencode below says it
enable_language(CUDA)
# CMake 3.25 does not know that this compiler has C++20.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
# Hopper's own code, and a portable target whose PTX later devices compile at start.
add_compile_options(
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_90a,code=sm_90a>"
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_80,code=[sm_80,compute_80]>")
find_package(CUDAToolkit 13 REQUIRED)
if(CCACHE_PROGRAM)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()
